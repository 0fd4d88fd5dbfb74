-- Records of one subscription, newest first, that are in a state: among a thousand before 'before'.
-- Answers the time, where to go on (empty: nowhere), then id and fields of each.
local s = open(take())
local before, wanted, limit = take(), take(), tonumber(take())
if before == '' then catch_up(s) end
local found = call('ZREVRANGEBYSCORE', s.records, before == '' and '+inf' or '(' .. before, '-inf',
  'WITHSCORES', 'LIMIT', 0, 1000)
local answer, last, count = {time_text(now), ''}, '', 0
for n = 1, #found, 2 do
  local key = s.message .. found[n]
  last = found[n + 1]
  local m = call('HMGET', key, 'state', 'failed', 'due')
  local state = m[1]
  if state == 'waiting' then
    if tonumber(m[2] or 0) > 0 then state = 'retrying'
    elseif tonumber(m[3]) > now then state = 'scheduled'
    else state = 'ready' end
  end
  if state and (wanted == '' or state == wanted) then
    answer[#answer + 1] = found[n]
    answer[#answer + 1] = call('HGETALL', key)
    count = count + 1
    if count == limit then break end
  end
end
if #found > 0 and count < limit then answer[2] = last end
return answer
