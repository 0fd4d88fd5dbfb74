-- Store messages, each in all subscriptions that want it or in none. Answers: '=' and the id, or an error.
local targets = {}
for n = 1, tonumber(take()) do
  local s = open(take())
  s.ordered, s.limit, s.pending, s.lanes, s.added = take() == '1', tonumber(take()), 0, {}, {}
  if s.limit then catch_up(s) end
  targets[n] = s
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
  call('XTRIM', key, 'MINID', '~', string.format('%d', (now - retention) * 1000))
end

-- What an earlier message with the same idempotency key means for this one.
local function earlier(once_key, payload)
  local first = call('HMGET', once_key, 'id', 'payload', 'until')
  if first[1] and tonumber(first[3]) > now then
    return (first[2] == payload and '=' or 'CONFLICT ') .. first[1]
  end
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
  local fields = tonumber(take())
  local first = place_in_args + 1
  local last = place_in_args + fields
  place_in_args = last
  local once_key = window ~= '' and root .. 'once:' .. topic .. ':' .. once
  local answer = once_key and earlier(once_key, payload)
  if not answer then
    local lacking, known, full = ask(wanted, id)
    if #full > 0 then
      answer = 'FULL ' .. table.concat(full, ', ')
    else
      local due = not_before ~= '' and tonumber(not_before) > now and not_before or now_text
      for _, s in ipairs(lacking) do store(s, id, priority, due, key, expires, first, last) end
      local fresh = #lacking > 0 and not known
      if wanted == '' and not is_known(nobody, id) then
        note_unwanted(id, math.max(retention, tonumber(ttl)), first, last)
        fresh = true
      end
      if fresh and retention > 0 then retain(topic, retention, id, first, last) end
      if once_key then
        call('HSET', once_key, 'id', id, 'payload', payload, 'until', now + window)
        call('PEXPIRE', once_key, math.ceil(window * 1000) + 1000)
      end
      answer = '=' .. id
    end
  end
  answers[n] = answer
end

for _, s in ipairs(targets) do
  if #s.added > 0 then
    call('ZADD', s.records, unpack(s.added))
    for priority, waiting in pairs(s.lanes) do call('ZADD', lane(s, priority), unpack(waiting)) end
    if s.pending > 0 then call('HINCRBY', s.info, 'live', s.pending) end
    ring(s)
  end
end
return answers
