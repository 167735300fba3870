-- Hand out a token and count the use, in one step: check its expiry, count, and add an audit entry to the stream.
-- If the copy may be out of date, do nothing unless the caller insists.
--
-- KEYS  token, count, uses
-- ARGV  user id, alive after (seconds since 1970), actor, now (seconds since 1970), id of this use, 1 to insist
-- Returns what was found and Redis's time in milliseconds. For a token, it also returns the token, its count and the
-- length of the stream.
local clock = redis.call('TIME')
local time = clock[1] * 1000 + math.floor(clock[2] / 1000)
local kept = redis.call('GET', KEYS[1])
if not kept then
  return {'nothing', time}
end
local vacant_since = string.match(kept, '^vacant (%d+)$')  -- see dig_up.lua
if vacant_since then
  return {'nothing', math.max(time, tonumber(vacant_since) + 1)}  -- this reader comes after it
end
local fresh_until, expires_at, token_id, token = string.match(kept, '^(%d+) %d+ (%d+) (%S+) (.+)$')
if not token then
  return {'gone', time}  -- a tombstone: the token is being replaced, or was revoked
end
if tonumber(expires_at) <= tonumber(ARGV[2]) then
  return {'dead', time}
end
if tonumber(fresh_until) < time and ARGV[6] ~= '1' then
  return {'old', time}
end
redis.call('XADD', KEYS[3], '*', 'token', token_id, 'user', ARGV[1], 'actor', ARGV[3], 'at', ARGV[4], 'use', ARGV[5])
local count = redis.call('INCR', KEYS[2])
if count == 1 then
  redis.call('PEXPIRE', KEYS[2], redis.call('PTTL', KEYS[1]))  -- otherwise a lost count would come back without expiry
end
return {'used', time, token, count, redis.call('XLEN', KEYS[3])}
