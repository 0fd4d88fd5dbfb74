-- Lease ready messages. Answers: the time, seconds until the next is due by time alone, then id and fields of each;
-- no fields: the message is not there any more.
local s = open_declared(take())
if not s then return redis.error_reply('GONE no such subscription') end
local holder, turn, lease, max, suspect = take(), take(), tonumber(take()), tonumber(take()), take()
beat(s, holder)
catch_up(s)

-- What earlier turns took is not known to the holder, if their answers were lost: it goes back.
local unanswered = {}
for _ = 1, tonumber(take()) do unanswered[holder .. '/' .. take()] = true end
if next(unanswered) then
  for _, taken in ipairs(call('ZRANGE', s.leases, 0, -1)) do
    local by, id = string.match(taken, '^([^/]+/[^/]+)/(.*)$')
    if unanswered[by] then
      call('ZREM', s.leases, taken)
      wait(s, id, 0, true)
    end
  end
end

local found, more = {}, false
local may_have_suspect = suspect == '' or not call('ZSCORE', s.leases, suspect)
for priority = 9, 0, -1 do
  if may_have_suspect and #found < max then
    local key = lane(s, priority, '1')
    local ready = call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, 1)
    if ready[1] then
      call('ZREM', key, ready[1])
      found[#found + 1] = ready[1]
      -- There may be more of them, for others.
      may_have_suspect, more = false, true
    end
  end
  local key = lane(s, priority)
  local ready = call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, max - #found + 1)
  if #ready > max - #found then
    more = true
    ready[#ready] = nil
  end
  if #ready > 0 then
    call('ZREM', key, unpack(ready))
    for _, member in ipairs(ready) do found[#found + 1] = member end
  end
  if #found == max and more then break end
end

local answer, leases, till = {time_text(now), ''}, {}, string.format('%.17g', now + lease)
local expiring = #found > 0 and call('ZCARD', s.expiry) > 0
for _, member in ipairs(found) do
  local id = sub(member, 17)
  local key = s.message .. id
  local stored, expires = call('HGETALL', key), expiring and call('ZSCORE', s.expiry, id)
  if #stored == 0 then
    answer[#answer + 1], answer[#answer + 2] = id, stored
    miss_any(s, id)
  elseif expires and tonumber(expires) <= now then
    finish(s, id, 'expired')
  else
    answer[#answer + 1], answer[#answer + 2] = id, stored
    call('HSET', key, 'state', 'running', 'started_at', now_text)
    leases[#leases + 1] = till
    leases[#leases + 1] = holder .. '/' .. turn .. '/' .. id
  end
end
if #leases > 0 then call('ZADD', s.leases, unpack(leases)) end
if #answer > 2 then
  if more then ring(s) end
  return answer
end

local due = call('ZRANGE', s.leases, 0, 0, 'WITHSCORES')[2]
local next_due = tonumber(due or 'inf')
for priority = 0, 9 do
  for _, kind in ipairs({'', '1'}) do
    local first = call('ZRANGEBYSCORE', lane(s, priority, kind), '(' .. time_text(now), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
    if first[2] then next_due = math.min(next_due, tonumber(first[2])) end
  end
end
-- Whoever of the others gives no sign of life until then may be dead.
local silent = ARGV[1] == '' and call('ZRANGE', s.holders, 0, 0, 'WITHSCORES')[2]
if silent and tonumber(silent) > now then next_due = math.min(next_due, tonumber(silent) + 0.001) end
if next_due < math.huge then answer[2] = time_text(next_due - now) end
return answer
