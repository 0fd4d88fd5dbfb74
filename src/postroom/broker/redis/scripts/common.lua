-- Prepended to every script: time, names of keys, and what can happen to a message of one subscription.
-- KEYS[1] is the topology; all keys of a namespace share its hash tag, so that they lie in one slot of a cluster.
-- KEYS[2] is never there: see ``Link.run``.
-- ARGV[1] is the time, empty for the server's own; ARGV[2] the topology's version as the caller knows it, or empty.
local call, sub = redis.call, string.sub
local root = sub(KEYS[1], 1, -9)
local clock = call('TIME')
local real = clock[1] + clock[2] / 1e6
local now = ARGV[1] == '' and real or tonumber(ARGV[1])
-- Made once: a number is written as text each time it is given to a command.
local now_text = string.format('%.17g', now)
if ARGV[2] ~= '' and (call('HGET', KEYS[1], 'version') or '0') ~= ARGV[2] then
  return redis.error_reply('STALE the topology has changed')
end

local place_in_args = 2
local function take()
  place_in_args = place_in_args + 1
  return ARGV[place_in_args]
end

local function open(name)
  local p = root .. 'sub:' .. name .. ':'
  return {
    name = name, p = p, message = p .. 'message:', info = p .. 'info', records = p .. 'records',
    leases = p .. 'leases', started = p .. 'started', holders = p .. 'holders', bell = p .. 'bell',
    expiry = p .. 'expiry', ended = p .. 'ended', dead = p .. 'dead', heads = p .. 'heads',
  }
end

local function open_declared(name)
  if call('HEXISTS', KEYS[1], 'sub:' .. name) == 0 then return nil end
  return open(name)
end

-- Publish order, over all subscriptions: so many numbers, one after the other.
local function numbers(count)
  local number = call('INCRBY', root .. 'numbers', count) - count
  return function()
    number = number + 1
    return string.format('%016d', number)
  end
end

local function time_text(seconds) return string.format('%.6f', seconds) end

-- One token at most: it wakes one consumer that waits, or the next that would; whoever finds more rings again.
local function ring(s)
  if call('LLEN', s.bell) == 0 then call('RPUSH', s.bell, 1) end
end

-- Waiting messages stand in sorted sets by the time they become ready; what was given back has the time 0.
local function lane(s, priority, suspect)
  return s.p .. (suspect == '1' and 'suspects:' or 'line:') .. (priority or '0')
end

local function place(s, id)
  local m = call('HMGET', s.message .. id, 'seq', 'priority', 'suspect', 'due', 'ahead')
  call('ZADD', lane(s, m[2], m[3]), m[5] == '1' and '0' or m[4], m[1] .. id)
end

local function forget(s, id)
  call('DEL', s.message .. id)
  call('ZREM', s.records, id)
  call('ZREM', s.ended, id)
  call('ZREM', s.dead, id)
end

-- A server that makes room by itself, or somebody by hand, has deleted a message that had not ended.
local function miss(s, id)
  call('HINCRBY', s.info, 'live', -1)
  forget(s, id)
end

-- Of one key only the head can be taken: the one that runs, else the first published.
local function advance(s, key)
  local line = s.p .. 'key:' .. key
  local first = call('ZRANGE', line, 0, 0)[1]
  while first and call('EXISTS', s.message .. sub(first, 17)) == 0 do
    call('ZREM', line, first)
    miss(s, sub(first, 17))
    first = call('ZRANGE', line, 0, 0)[1]
  end
  local head = call('HGET', s.heads, key)
  if head then
    local m = call('HMGET', s.message .. sub(head, 17), 'state', 'priority', 'suspect')
    if m[1] == 'running' then return end
    if m[1] == 'waiting' and head ~= first then call('ZREM', lane(s, m[2], m[3]), head) end
  end
  if first then
    call('HSET', s.heads, key, first)
    place(s, sub(first, 17))
    ring(s)
  else
    call('HDEL', s.heads, key)
  end
end

-- The same, where its key is not known: those behind it must not wait for it. Many may be missing at once, and there
-- may be many keys: all are read once.
local function miss_any(s, id)
  if not s.key_of then
    s.key_of = {}
    local heads = call('HGETALL', s.heads)
    for n = 1, #heads, 2 do s.key_of[sub(heads[n + 1], 17)] = heads[n] end
  end
  if s.key_of[id] then return advance(s, s.key_of[id]) end
  miss(s, id)
end

-- Whether a message holds its key against unique ones, in any of the subscriptions it went to: 'until_done' as long as
-- it waits or runs, 'until_started' as long as it waits for its first start.
local function holds(once_key, id, how)
  for name in string.gmatch(call('HGET', once_key, 'subs') or '', '[^:]+') do
    local s = open(name)
    local m = call('HMGET', s.message .. id, 'state', 'failed')
    local expires = m[1] == 'waiting' and call('ZSCORE', s.expiry, id)
    if how == 'until_done' and m[1] == 'running' then return true end
    if m[1] == 'waiting' and (how == 'until_done' or tonumber(m[2] or 0) == 0)
      and not (expires and tonumber(expires) <= now) then return true end
  end
  return false
end

-- A key without a window goes with the last that is left of what held it.
local function let_go(id, once_key)
  if call('HGET', once_key, 'id') == id and not holds(once_key, id, 'until_done') then call('DEL', once_key) end
end

-- Forget what may still hold a key.
local function drop(s, id)
  local once_key = call('HGET', s.message .. id, 'holds')
  forget(s, id)
  if once_key then let_go(id, once_key) end
end

local function remember(s, id, failure)
  local key = s.message .. id
  local before = call('HGET', key, 'failures')
  call('HSET', key, 'failures', before and before .. '\n' .. failure or failure)
end

-- A failure that counts against the attempts.
local function add_failure(s, id, failure)
  remember(s, id, failure)
  call('HINCRBY', s.message .. id, 'failed', 1)
end

-- It ends: as succeeded, dead, cancelled or expired. Its status stays; of all but the dead the body goes.
local function finish(s, id, state, result)
  local key = s.message .. id
  local m = call('HMGET', key, 'seq', 'priority', 'suspect', 'key', 'ordered', 'expires', 'result_ttl', 'state',
    'holds')
  if m[8] == 'waiting' then call('ZREM', lane(s, m[2], m[3]), m[1] .. id) end
  if m[6] then call('ZREM', s.expiry, id) end
  call('HINCRBY', s.info, 'live', -1)
  call('HSET', key, 'state', state, 'finished_at', now_text, 'suspect', '')
  if state == 'dead' then
    local number = call('HINCRBY', s.info, 'deaths', 1)
    call('HSET', key, 'death', number)
    call('ZADD', s.dead, number, id)
  else
    call('HDEL', key, 'data', 'headers', 'progress')
    if result and result ~= '' then call('HSET', key, 'result', result) end
    local ttl = tonumber(m[7] or 86400)
    if ttl > 0 then call('ZADD', s.ended, now + ttl, id) else forget(s, id) end
  end
  if m[5] then
    call('ZREM', s.p .. 'key:' .. m[4], m[1] .. id)
    advance(s, m[4])
  end
  -- The dead may be redriven.
  if m[9] and state ~= 'dead' then let_go(id, m[9]) end
end

-- What ran waits again: after a delay, or ahead of all others. suspect: '1', '' or nil for as it was.
local function wait(s, id, delay, ahead, suspect)
  local key = s.message .. id
  local m = call('HMGET', key, 'cancel', 'key', 'ordered', 'expires', 'due', 'seq')
  if not m[6] then return miss_any(s, id) end
  if m[1] then return finish(s, id, 'cancelled') end
  call('HSET', key, 'state', 'waiting', 'due', ahead and m[5] or now + delay, 'ahead', ahead and '1' or '')
  call('HDEL', key, 'progress')
  if suspect then call('HSET', key, 'suspect', suspect) end
  if m[4] then call('ZADD', s.expiry, m[4], id) end
  if m[3] then advance(s, m[2]) else place(s, id) end
  ring(s)
end

-- A copy begins, or begins anew: it waits for its time, or for its key.
local function enter(s, id, seq, priority, due, key, ordered)
  call('HINCRBY', s.info, 'live', 1)
  if ordered then
    call('HSET', s.message .. id, 'ordered', '1')
    call('ZADD', s.p .. 'key:' .. key, seq, seq .. id)
    advance(s, key)
  else
    call('ZADD', lane(s, priority), due, seq .. id)
  end
end

-- It had ended, and is to be handled once more: attempts from 1, history kept.
local function revive(s, id, ordered)
  local key = s.message .. id
  local m = call('HMGET', key, 'seq', 'priority', 'key')
  call('ZREM', s.ended, id)
  call('ZREM', s.dead, id)
  call('HSET', key, 'state', 'waiting', 'due', now_text, 'ahead', '', 'failed', 0)
  call('HDEL', key, 'finished_at', 'started_at', 'result', 'progress', 'cancel', 'ordered', 'suspect')
  enter(s, id, m[1], m[2], now, m[3], ordered and m[3])
end

-- A lease is over: its holder has died or is frozen. It counts only if the handler had been started.
local function recover(s, lease)
  local holder, id = string.match(lease, '^([^/]+)/[^/]+/(.*)$')
  call('ZREM', s.leases, lease)
  local m = call('HMGET', s.message .. id, 'failed', 'started_at')
  if call('SREM', s.started, lease) == 0 or not m[2] then return wait(s, id, 0, true) end
  local text = 'the lease ended while the handler ran: its worker died or was frozen'
  add_failure(s, id, string.format(
    '{"attempt":%d,"reason":"worker_lost","message":"%s","worker":%s,"started_at":%s,"failed_at":%s}',
    (m[1] or 0) + 1, text, cjson.encode(string.match(holder, '^(.*)%.')), m[2], time_text(now)))
  wait(s, id, 0, true, '1')
end

-- How many connections say that they are this process: it listens on a channel, as long as it lives.
local function connections(process) return call('PUBSUB', 'NUMSUB', root .. 'alive:' .. process)[2] end

-- Consumers of living processes renew their entry every second, by the server's own clock. After a pause of the
-- server none could: then all are given the time to do so.
local PULSE, GRACE = 2.5, 4
local function beat(s, holder)
  local pulse = call('HMGET', root .. 'pulse', 'last', 'grace')
  if not pulse[1] or real - pulse[1] > PULSE then call('HSET', root .. 'pulse', 'grace', real + GRACE) end
  call('HSET', root .. 'pulse', 'last', real)
  call('ZADD', s.holders, real + GRACE, holder)
end

local function recover_dead(s)
  local silent = call('ZRANGEBYSCORE', s.holders, '-inf', real, 'LIMIT', 0, 100)
  if #silent == 0 or real < tonumber(call('HGET', root .. 'pulse', 'grace') or 0) then return end
  local dead, is_dead = {}, {}
  for _, holder in ipairs(silent) do
    if connections(string.match(holder, '^(.*)%-')) > 0 then
      -- Frozen or short of time: it keeps what it holds until its leases end.
      call('ZADD', s.holders, real + 1, holder)
    else
      dead[#dead + 1], is_dead[holder] = holder, true
    end
  end
  if #dead == 0 then return end
  for _, lease in ipairs(call('ZRANGE', s.leases, 0, -1)) do
    if is_dead[string.match(lease, '^[^/]+')] then recover(s, lease) end
  end
  call('ZREM', s.holders, unpack(dead))
end

-- Let everything happen that is due. In steps of a thousand, for everybody else waits meanwhile.
local function catch_up(s)
  recover_dead(s)
  for _, lease in ipairs(call('ZRANGEBYSCORE', s.leases, '-inf', now, 'LIMIT', 0, 1000)) do recover(s, lease) end
  for _, id in ipairs(call('ZRANGEBYSCORE', s.expiry, '-inf', now, 'LIMIT', 0, 1000)) do
    -- What runs may be settled later; if it comes back it is entered again.
    if call('HGET', s.message .. id, 'state') == 'waiting' then finish(s, id, 'expired')
    else call('ZREM', s.expiry, id) end
  end
  for _, id in ipairs(call('ZRANGEBYSCORE', s.ended, '-inf', now, 'LIMIT', 0, 1000)) do forget(s, id) end
end

-- Whether a copy of that id is held or remembered.
local function is_known(s, id)
  if call('EXISTS', s.message .. id) == 0 then return false end
  local ended = call('ZSCORE', s.ended, id)
  if ended and tonumber(ended) <= now then
    forget(s, id)
    return false
  end
  return true
end
