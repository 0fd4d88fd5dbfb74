-- The records of so many ids and subscriptions; empty where there is none.
local told = {}
for n = 1, tonumber(take()) do told[n] = call('HGET', record_of(take()), take()) or '' end
return told
