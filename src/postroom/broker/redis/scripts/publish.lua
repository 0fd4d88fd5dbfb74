-- Store messages, each in all subscriptions that want it or in none. Answers: '=' and the id, or an error.
local targets = {}
for n = 1, tonumber(take()) do
  local s = open(take())
  s.ordered, s.limit, s.lanes, s.added = take() == '1', tonumber(take()), {}, {}
  if s.limit then catch_up(s) end
  targets[n] = s
end
local nobody = open('')

local function store(s, id, priority, due, key, expires, fields)
  local seq = next_number()
  call('HSET', s.message .. id, 'state', 'waiting', 'seq', seq, 'due', due, 'published', now, unpack(fields))
  if expires ~= '' then call('ZADD', s.expiry, expires, id) end
  if s.ordered and key then
    enter(s, id, seq, priority, due, key, true)
  else
    -- Entered together at the end, in one call.
    local waiting = s.lanes[priority] or {}
    s.lanes[priority] = waiting
    waiting[#waiting + 1], waiting[#waiting + 2] = due, seq .. id
  end
  s.added[#s.added + 1], s.added[#s.added + 2] = seq, id
end

local function note_unwanted(id, keep, fields)
  catch_up(nobody)
  local seq = next_number()
  local key = nobody.message .. id
  call('HSET', key, 'state', 'succeeded', 'seq', seq, 'published', now, 'finished_at', now, unpack(fields))
  call('HDEL', key, 'data', 'headers')
  call('ZADD', nobody.records, seq, id)
  call('ZADD', nobody.ended, now + keep, id)
end

-- Its log is a stream that others may read, too.
local function retain(topic, retention, id, fields)
  local key = root .. 'log:' .. topic
  call('XADD', key, ARGV[1] == '' and '*' or string.format('%d-*', now * 1000), 'id', id, unpack(fields))
  call('XTRIM', key, 'MINID', '~', string.format('%d', (now - retention) * 1000))
end

local answers = {}
for n = 1, tonumber(take()) do
  local id, topic, wanted = take(), take(), take()
  local priority, not_before, expires, ttl, retention = take(), tonumber(take()), take(), take(), take()
  local key, once, print, window = take(), take(), take(), take()
  local fields = {}
  for f = 1, tonumber(take()) do fields[f] = take() end
  local answer, once_key = nil, root .. 'once:' .. topic .. ':' .. once
  if window ~= '' then
    local first = call('HMGET', once_key, 'id', 'payload', 'until')
    if first[1] and tonumber(first[3]) > now then
      answer = first[2] == print and '=' .. first[1] or 'CONFLICT ' .. first[1]
    end
  end
  if not answer then
    local holding, lacking, full = false, {}, {}
    for target in string.gmatch(wanted, '%d+') do
      local s = targets[tonumber(target)]
      if is_known(s, id) then holding = true else lacking[#lacking + 1] = s end
    end
    for _, s in ipairs(lacking) do
      if s.limit and tonumber(call('HGET', s.info, 'live') or 0) + (s.pending or 0) >= s.limit then
        full[#full + 1] = s.name
      end
    end
    if #full > 0 then
      answer = 'FULL ' .. table.concat(full, ', ')
    else
      local key_of = key ~= '' and sub(key, 2) or nil
      local due = math.max(now, not_before or 0)
      for _, s in ipairs(lacking) do
        store(s, id, priority, due, key_of, expires, fields)
        if not (s.ordered and key_of) then s.pending = (s.pending or 0) + 1 end
      end
      local fresh = #lacking > 0
      if wanted == '' and not is_known(nobody, id) then
        fresh = true
        note_unwanted(id, math.max(tonumber(retention), tonumber(ttl)), fields)
      end
      if fresh and not holding and tonumber(retention) > 0 then retain(topic, tonumber(retention), id, fields) end
      if window ~= '' then
        call('HSET', once_key, 'id', id, 'payload', print, 'until', now + window)
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
    if s.pending then call('HINCRBY', s.info, 'live', s.pending) end
    ring(s)
  end
end
return answers
