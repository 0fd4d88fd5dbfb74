-- Renew leases. Answers 1 for each that is still there.
local s = open(take())
catch_up(s)
local till, answers, renewed = now + take(), {}, {}
for n = 1, tonumber(take()) do
  local lease = take()
  answers[n] = call('ZSCORE', s.leases, lease) and 1 or 0
  if answers[n] == 1 then renewed[#renewed + 1], renewed[#renewed + 2] = till, lease end
end
if #renewed > 0 then call('ZADD', s.leases, unpack(renewed)) end
return answers
