-- Of these leases: write the progress of those that are still there, if it is given. Answers 1 where a running
-- message's cancellation was requested.
local s, answers = open(take()), {}
for n = 1, tonumber(take()) do
  local id, lease, progress = take(), take(), take()
  local key = s.message .. id
  answers[n] = 0
  -- Of a message that the server has deleted nothing may stay.
  if call('ZSCORE', s.leases, lease) and call('EXISTS', key) == 1 then
    if progress ~= '' then call('HSET', key, 'progress', progress) end
    if call('HGET', key, 'cancel') then answers[n] = 1 end
  end
end
return answers
