-- Keep a copy of a token, but never replace a newer copy with an older one.
--
-- KEYS  token, count, databases
-- ARGV  token, generation, expires at (seconds since 1970), token id, uses so far, milliseconds until the key ends,
--       milliseconds for which the copy is believed, since when (Redis's time in milliseconds), tombstone, database
-- Returns the number of uses, or -1 if the copy was not taken. A reader that found nothing passes `since`, because the
-- token that it read from PostgreSQL may have been replaced by the time it gets here. A writer passes 0 and its own
-- tombstone: if another tombstone is there, somebody else has replaced or revoked the token since.
local clock = redis.call('TIME')
local time = clock[1] * 1000 + math.floor(clock[2] / 1000)
local since, believed = tonumber(ARGV[8]), tonumber(ARGV[7])
local kept = redis.call('GET', KEYS[1])
local generation = kept and tonumber(string.match(kept, '^%d+ (%d+) '))
if since == 0 and kept ~= ARGV[9] then
  if generation and generation < tonumber(ARGV[2]) then
    redis.call('DEL', KEYS[1])  -- our tombstone never arrived, and an older copy stayed or came back
  end
  return -1
end
local vacant_since = kept and tonumber(string.match(kept, '^vacant (%d+)$'))
local vacant = vacant_since and since > vacant_since
if since > 0 and (time > since + believed or (kept and not generation and not vacant)) then
  return -1  -- too late; or a tombstone is there, which only its writer may replace, or was there when the reader read
end
if generation and generation > tonumber(ARGV[2]) then
  return -1
end
local fresh_until = (since > 0 and since or time) + believed
local header = string.format('%.0f %s %s %s ', fresh_until, ARGV[2], ARGV[3], ARGV[4])
redis.call('SET', KEYS[1], header .. ARGV[1], 'PX', ARGV[6])
local uses = tonumber(ARGV[5])
if generation == tonumber(ARGV[2]) then
  uses = math.max(uses, tonumber(redis.call('GET', KEYS[2]) or 0) + 1)  -- + 1 for the reader's own use
end
redis.call('SET', KEYS[2], uses, 'PX', ARGV[6])
-- Write down that there is a copy of this database's until then. A program that starts without PostgreSQL looks here.
local ends, last, others = time + tonumber(ARGV[6]), 0, ''
for name, until_then in string.gmatch(redis.call('GET', KEYS[3]) or '', '(%S+) (%d+)') do
  if name == ARGV[10] then
    ends = math.max(ends, tonumber(until_then))
  elseif tonumber(until_then) > time then
    last, others = math.max(last, tonumber(until_then)), others .. name .. ' ' .. until_then .. ' '
  end
end
local databases = string.format('%s%s %.0f', others, ARGV[10], ends)
redis.call('SET', KEYS[3], databases, 'PX', string.format('%.0f', math.max(ends, last) - time))
return uses
