-- The records of one message in these subscriptions. Answers the time, then subscription and fields of each.
local id, answer = take(), {time_text(now)}
for n = 1, tonumber(take()) do
  local s = open(take())
  catch_up(s)
  if is_known(s, id) then
    answer[#answer + 1] = n
    answer[#answer + 1] = call('HGETALL', s.message .. id)
  end
end
return answer
