-- Write what has changed of the topology, which is what the caller thinks it is.
local fields = {}
for n = 1, tonumber(take()) do fields[n] = take() end
if #fields > 0 then call('HSET', KEYS[1], unpack(fields)) end
return call('HINCRBY', KEYS[1], 'version', 1)
