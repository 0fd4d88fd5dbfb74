-- Cancel every copy of a message that has not ended. Answers what came of each.
local id, answers = take(), {}
for _ = 1, tonumber(take()) do
  local s = open(take())
  catch_up(s)
  local state = call('HGET', s.message .. id, 'state')
  if state == 'waiting' then
    finish(s, id, 'cancelled')
    answers[#answers + 1] = 'cancelled'
  elseif state == 'running' then
    call('HSET', s.message .. id, 'cancel', '1')
    answers[#answers + 1] = 'requested'
  elseif state then
    answers[#answers + 1] = 'finished'
  end
end
return answers
