-- Delete a subscription with the rest of what it holds; a queue with it, which would accept jobs and drop them.
local s = open_declared(take())
if not s then return redis.error_reply('GONE no such subscription') end
local is_queue = take() == '1'
for _, id in ipairs(call('ZRANGE', s.records, 0, -1)) do
  local m = call('HMGET', s.message .. id, 'key', 'ordered')
  if m[2] then call('DEL', s.p .. 'key:' .. m[1]) end
  drop(s, id)
end
call('DEL', s.info, s.records, s.leases, s.started, s.holders, s.bell, s.expiry, s.ended, s.dead, s.heads)
for priority = 0, 9 do call('DEL', lane(s, priority), lane(s, priority, '1')) end
call('HDEL', KEYS[1], 'sub:' .. s.name, 'filling:' .. s.name)
if is_queue then call('HDEL', KEYS[1], 'topic:' .. s.name) end
return call('HINCRBY', KEYS[1], 'version', 1)
