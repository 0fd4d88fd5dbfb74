-- Prepended to every script. KEYS[1] is the topology; all keys of the store share its hash tag. KEYS[2] is never
-- there: see ``Link.run``.
-- ARGV[1] is unused; ARGV[2] the topology's version as the caller knows it, or empty.
--
-- A record is a field, named after the subscription, in the hash of its id. It is opaque but for its head:
-- bytes 1 to 8 tell this writing of it from any other, byte 9 is 1 if it is confirmed, byte 10 is 1 if a copy of it
-- was delivered, byte 11 is its state. The field '*', which is no subscription, leads to its idempotency key.
local call, sub = redis.call, string.sub
local root = sub(KEYS[1], 1, -9)
if ARGV[2] ~= '' and (call('HGET', KEYS[1], 'version') or '0') ~= ARGV[2] then
  return redis.error_reply('STALE the topology has changed')
end

local place_in_args = 2
local function take()
  place_in_args = place_in_args + 1
  return ARGV[place_in_args]
end

local function record_of(id) return root .. 'record:' .. id end

local function insert(id, name, value, forget)
  call('HSET', record_of(id), name, value)
  local number = call('INCR', root .. 'numbers')
  call('ZADD', root .. 'order', number, name .. ':' .. id)
  call('ZADD', root .. 'order:' .. name, number, id)
  if forget ~= '' then call('ZADD', root .. 'ends', forget, name .. ':' .. id) end
end

local function key_of(id)
  local place = call('HGET', record_of(id), '*')
  if not place then return nil end
  local key = root .. 'key:' .. place
  return call('HGET', key, 'id') == id and key or nil
end

local function remove(id, name)
  local record = record_of(id)
  call('HDEL', record, name)
  call('ZREM', root .. 'order', name .. ':' .. id)
  call('ZREM', root .. 'order:' .. name, id)
  call('ZREM', root .. 'ends', name .. ':' .. id)
  if call('HLEN', record) == 1 then
    -- Keys held by unique messages have no window: they go with what held them.
    local key = key_of(id)
    if key and call('HGET', key, 'until') == 'inf' then call('DEL', key) end
    call('HDEL', record, '*')
  end
end

local function confirm_key(id)
  local key = key_of(id)
  if key then call('HSET', key, 'confirmed', '1') end
end
