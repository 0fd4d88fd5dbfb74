-- Perform outcomes, each only if its lease is still there. Answers 1 for settled, 0 for lost.
local s = open(take())
local count = tonumber(take())
local items, leases = {}, {}
-- How many values follow each verb.
local values = {plain = 2, ack = 2, retry = 3, release = 1, dead = 1, cancel = 0}
for n = 1, count do
  local item = {lease = take(), op = take()}
  for at = 1, values[item.op] do item[at] = take() end
  items[n], leases[n] = item, item.lease
end
local held = count > 0 and call('ZMSCORE', s.leases, unpack(leases)) or {}
if count > 0 then
  call('ZREM', s.leases, unpack(leases))
  call('SREM', s.started, unpack(leases))
end

local ended, answers, done = {}, {}, 0
-- The common case, with as few commands as can be.
local function acknowledge(id, lease, ttl, result)
  local key = s.message .. id
  done = done + 1
  if ttl <= 0 then return forget(s, id) end
  call('HDEL', key, 'data', 'headers', 'progress')
  if result == '' then call('HSET', key, 'state', 'succeeded', 'finished_at', now_text, 'by', lease)
  else call('HSET', key, 'state', 'succeeded', 'finished_at', now_text, 'by', lease, 'result', result) end
  ended[#ended + 1], ended[#ended + 2] = now + ttl, id
end

local function perform(id, op, one, two, three)
  if op == 'ack' then finish(s, id, 'succeeded', two)
  elseif op == 'cancel' then finish(s, id, 'cancelled')
  elseif op == 'release' then wait(s, id, tonumber(one), tonumber(one) <= 0)
  elseif op == 'retry' then
    add_failure(s, id, two)
    wait(s, id, tonumber(one), false, three)
  else
    remember(s, id, one)
    finish(s, id, 'dead')
  end
end

for n, item in ipairs(items) do
  -- A lease is holder/turn/id, and no holder has a slash.
  local id = string.match(item.lease, '^[^/]*/[^/]*/(.*)$')
  local key = s.message .. id
  if not held[n] then
    -- Whoever did not get the answer asks again.
    answers[n] = call('HGET', key, 'by') == item.lease and 1 or 0
  else
    answers[n] = 1
    if item.op == 'plain' then
      acknowledge(id, item.lease, tonumber(item[1]), item[2])
    else
      call('HSET', key, 'by', item.lease)
      perform(id, item.op, item[1], item[2], item[3])
    end
  end
end
if #ended > 0 then call('ZADD', s.ended, unpack(ended)) end
if done > 0 then call('HINCRBY', s.info, 'live', -done) end
-- A consumer that closes is not missed.
local leaving = take()
if leaving ~= '' then call('ZREM', s.holders, leaving) end
return answers
