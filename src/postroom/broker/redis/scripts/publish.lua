-- Store messages, each in all subscriptions that want it or in none. Answers: '=' and the id, or an error.
local targets, target_of = {}, {}
for n = 1, tonumber(take()) do
  local s = open(take())
  s.ordered, s.limit, s.pending, s.lanes, s.added = take() == '1', tonumber(take()), 0, {}, {}
  if s.limit then catch_up(s) end
  targets[n], target_of[s.name] = s, s
end
local nobody = open('')
local count = tonumber(take())
local next_number = numbers(count * math.max(1, #targets))

-- The fields of a message are ARGV[first] to ARGV[last].
local function store(s, id, priority, due, key, expires, first, last)
  local seq = next_number()
  call('HSET', s.message .. id, 'state', 'waiting', 'seq', seq, 'due', due, unpack(ARGV, first, last))
  if expires ~= '' then call('ZADD', s.expiry, expires, id) end
  if s.ordered and key ~= '' then
    enter(s, id, seq, priority, due, sub(key, 2), true)
  else
    -- Entered together at the end, in one call.
    local waiting = s.lanes[priority] or {}
    s.lanes[priority] = waiting
    waiting[#waiting + 1], waiting[#waiting + 2] = due, seq .. id
    s.pending = s.pending + 1
  end
  s.added[#s.added + 1], s.added[#s.added + 2] = seq, id
end

local function note_unwanted(id, keep, first, last)
  catch_up(nobody)
  local seq, key = next_number(), nobody.message .. id
  call('HSET', key, 'state', 'succeeded', 'seq', seq, 'finished_at', now_text, unpack(ARGV, first, last))
  call('HDEL', key, 'data', 'headers')
  call('ZADD', nobody.records, seq, id)
  call('ZADD', nobody.ended, now + keep, id)
end

-- The log is a stream that others may read, too.
local function retain(topic, retention, id, first, last)
  local key = root .. 'log:' .. topic
  local place = ARGV[1] == '' and '*' or string.format('%d-*', now * 1000)
  call('XADD', key, place, 'id', id, unpack(ARGV, first, last))
  call('XTRIM', key, 'MINID', '~', string.format('%d', math.max(0, now - retention) * 1000))
end

-- What was stored is entered, all of a subscription in few calls.
local function enter_stored(s)
  if #s.added == 0 then return end
  call('ZADD', s.records, unpack(s.added))
  for priority, waiting in pairs(s.lanes) do call('ZADD', lane(s, priority), unpack(waiting)) end
  if s.pending > 0 then call('HINCRBY', s.info, 'live', s.pending) end
  ring(s)
  s.pending, s.lanes, s.added = 0, {}, {}
end

-- What an earlier message with the same idempotency key means for this one: an answer, or the id of what it replaces.
local function earlier(once_key, payload, id, unique, replace)
  local first = call('HMGET', once_key, 'id', 'payload', 'until')
  if not first[1] or tonumber(first[3]) <= now then return end
  if unique ~= '' and not holds(once_key, first[1], unique) then return end
  if replace and first[1] ~= id then return nil, first[1] end
  return (first[2] == payload and '=' or 'CONFLICT ') .. first[1]
end

-- Cancel what is replaced, as far as it waits for its first start.
local function displace(once_key, id)
  for name in string.gmatch(call('HGET', once_key, 'subs'), '[^:]+') do
    local s = target_of[name] or open(name)
    if s.added then enter_stored(s) end
    local m = call('HMGET', s.message .. id, 'state', 'failed')
    if m[1] == 'waiting' and tonumber(m[2] or 0) == 0 then finish(s, id, 'cancelled') end
  end
end

local function hold_key(once_key, id, payload, window, wanted, unique)
  local names = {}
  for target in string.gmatch(wanted, '%d+') do
    local s = targets[tonumber(target)]
    names[#names + 1] = s.name
    if unique then call('HSET', s.message .. id, 'holds', once_key) end
  end
  call('HSET', once_key, 'id', id, 'payload', payload, 'until', unique and 'inf' or now + window,
    'subs', table.concat(names, ':'))
  if unique then call('PERSIST', once_key)
  else call('PEXPIRE', once_key, math.min(math.ceil(window * 1000) + 1000, 1e15)) end
end

-- Those that want it and do not know it; whether any knows it; and the names of those that are full.
local function ask(wanted, id)
  local lacking, known, full = {}, false, {}
  for target in string.gmatch(wanted, '%d+') do
    local s = targets[tonumber(target)]
    if is_known(s, id) then known = true
    else
      lacking[#lacking + 1] = s
      if s.limit and tonumber(call('HGET', s.info, 'live') or 0) + s.pending >= s.limit then
        full[#full + 1] = s.name
      end
    end
  end
  return lacking, known, full
end

local answers = {}
for n = 1, count do
  local id, topic, wanted, priority, not_before, expires = take(), take(), take(), take(), take(), take()
  local ttl, retention, key, once, payload, window = take(), tonumber(take()), take(), take(), take(), take()
  local unique, replace = take(), take() == '1'
  local fields = tonumber(take())
  local first = place_in_args + 1
  local last = place_in_args + fields
  place_in_args = last
  local once_key = window ~= '' and root .. 'once:' .. topic .. ':' .. once
  local answer, replaced
  if once_key then answer, replaced = earlier(once_key, payload, id, unique, replace) end
  if not answer then
    local lacking, known, full = ask(wanted, id)
    if replaced and known then
      -- Published before: what came after it keeps the key.
      answer = '=' .. id
    elseif #full > 0 and not replaced then
      answer = 'FULL ' .. table.concat(full, ', ')
    else
      if replaced then displace(once_key, replaced) end
      local due = not_before ~= '' and tonumber(not_before) > now and not_before or now_text
      for _, s in ipairs(lacking) do store(s, id, priority, due, key, expires, first, last) end
      local fresh = #lacking > 0 and not known
      if wanted == '' and not is_known(nobody, id) then
        note_unwanted(id, math.max(retention, tonumber(ttl)), first, last)
        fresh = true
      end
      if fresh and retention > 0 then retain(topic, retention, id, first, last) end
      if once_key and (unique == '' or #lacking > 0) then
        hold_key(once_key, id, payload, window, wanted, unique ~= '')
      end
      answer = '=' .. id
    end
  end
  answers[n] = answer
end

for _, s in ipairs(targets) do enter_stored(s) end
return answers
