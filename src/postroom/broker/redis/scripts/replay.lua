-- Retained messages for one subscription: those it does not know, and 'again' those that have ended. Answers how many.
local s = open_declared(take())
if not s then return redis.error_reply('GONE no such subscription') end
local ordered, again, count = take() == '1', take() == '1', 0
catch_up(s)
for _ = 1, tonumber(take()) do
  local id, priority, expires, key = take(), take(), take(), take()
  local fields = {}
  for f = 1, tonumber(take()) do fields[f] = take() end
  local key_of = ordered and key ~= '' and sub(key, 2) or nil
  local record = s.message .. id
  if expires ~= '' and tonumber(expires) <= now then
    -- Too late to start it.
  elseif not is_known(s, id) then
    local seq = numbers(1)()
    call('HSET', record, 'state', 'waiting', 'seq', seq, 'due', now_text, unpack(fields))
    call('ZADD', s.records, seq, id)
    if expires ~= '' then call('ZADD', s.expiry, expires, id) end
    enter(s, id, seq, priority, now, key_of, key_of)
    count = count + 1
  elseif again then
    local state = call('HGET', record, 'state')
    if state ~= 'waiting' and state ~= 'running' then
      call('HSET', record, unpack(fields))
      if expires ~= '' then call('ZADD', s.expiry, expires, id) end
      revive(s, id, ordered)
      count = count + 1
    end
  end
end
if count > 0 then ring(s) end
return count
