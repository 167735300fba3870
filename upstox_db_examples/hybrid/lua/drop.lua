-- Remove a copy that is no longer believed, because PostgreSQL has no such token. A newer copy stays.
--
-- KEYS  token
local clock = redis.call('TIME')
local time = clock[1] * 1000 + math.floor(clock[2] / 1000)
local fresh_until = string.match(redis.call('GET', KEYS[1]) or '', '^(%d+) ')
if fresh_until and tonumber(fresh_until) < time then
  redis.call('DEL', KEYS[1])
end
