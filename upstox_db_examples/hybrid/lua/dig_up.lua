-- Take a writer's own tombstone away. What takes its place for a while says since when: who asked before that may have
-- read, in PostgreSQL, a token that was replaced before this tombstone came.
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
