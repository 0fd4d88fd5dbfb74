-- Ready, live, running, dead, and the age of the oldest ready message of each subscription.
local answer = {}
for n = 1, tonumber(take()) do
  local s = open(take())
  catch_up(s)
  local ready, since = 0, math.huge
  for priority = 0, 9 do
    for _, kind in ipairs({'', '1'}) do
      local key = lane(s, priority, kind)
      local count = call('ZCOUNT', key, '-inf', now)
      if count > 0 then
        ready = ready + count
        -- Those given back stand first, under no time of their own.
        local ahead = call('ZRANGEBYSCORE', key, '-inf', 0, 'LIMIT', 0, 100)
        for _, member in ipairs(ahead) do
          since = math.min(since, tonumber(call('HGET', s.message .. sub(member, 17), 'due') or now))
        end
        local first = call('ZRANGEBYSCORE', key, '(0', time_text(now), 'WITHSCORES', 'LIMIT', 0, 1)[2]
        if first then since = math.min(since, tonumber(first)) end
      end
    end
  end
  local age = since < math.huge and time_text(math.max(0, now - since)) or ''
  local live = tonumber(call('HGET', s.info, 'live') or 0)
  answer[n] = {ready, live, call('ZCARD', s.leases), call('ZCARD', s.dead), age}
end
return answer
