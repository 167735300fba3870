-- Remove a writer's own tombstone. For a while, a note takes its place that says since when the key is vacant. A reader
-- who asked before that may have read a token from PostgreSQL that was replaced before this tombstone came.
--
-- KEYS  token, for each user
-- ARGV  tombstone, milliseconds for which a copy is believed
local clock = redis.call('TIME')
local time = clock[1] * 1000 + math.floor(clock[2] / 1000)
for _, key in ipairs(KEYS) do
  if redis.call('GET', key) == ARGV[1] then
    redis.call('SET', key, string.format('vacant %.0f', time), 'PX', ARGV[2])
  end
end
