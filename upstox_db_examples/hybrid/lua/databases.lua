-- Return the names of the databases of whose tokens Redis may have copies; put.lua writes them down.
--
-- KEYS  databases
local clock = redis.call('TIME')
local time = clock[1] * 1000 + math.floor(clock[2] / 1000)
local known = {}
for name, ends in string.gmatch(redis.call('GET', KEYS[1]) or '', '(%S+) (%d+)') do
  if tonumber(ends) > time then
    known[#known + 1] = name
  end
end
return known
