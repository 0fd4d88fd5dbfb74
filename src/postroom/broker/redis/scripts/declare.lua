-- Write what has changed of the topology, which is what the caller thinks it is.
for _ = 1, tonumber(take()) / 2 do call('HSET', KEYS[1], take(), take()) end
return call('HINCRBY', KEYS[1], 'version', 1)
