-- End what waits among a thousand messages that follow 'from', in the order of their publication. 'delete': all of
-- them go, whatever they are. Answers how many ended, and the last that was looked at; empty when there are no more.
local s = open_declared(take())
if not s then return redis.error_reply('GONE no such subscription') end
local from, up_to, delete, count = take(), take(), take() == '1', 0
if up_to == '' then up_to = call('GET', root .. 'numbers') or '0' end
local found = call('ZRANGEBYSCORE', s.records, '(' .. from, up_to, 'WITHSCORES', 'LIMIT', 0, 1000)
for n = 1, #found, 2 do
  local id = found[n]
  local state = call('HGET', s.message .. id, 'state')
  if state == 'waiting' then
    finish(s, id, 'cancelled')
    count = count + 1
  end
  if delete and state ~= 'running' then drop(s, id) end
end
return {count, found[#found] or '', up_to}
