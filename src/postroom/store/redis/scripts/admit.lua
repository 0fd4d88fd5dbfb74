-- Before publishing: the key of each message leads to it or to the first, and whoever gets it has a record.
-- For each answers '1' (publish), '0' (the broker has it) or 'x' (conflict), its id, and the id of what it replaces.
local now = tonumber(take())
-- States, and where attempt and expiry are in the rest of a record, an array in MessagePack.
local WAITING, RUNNING, attempt_at, expires_at = take(), take(), tonumber(take()), tonumber(take())

-- Whether what waits or runs under an id holds its key against unique messages: 'until_done' as long as it does,
-- 'until_started' as long as it waits for its first start.
local function holds(id, how)
  local found = call('HGETALL', record_of(id))
  for at = 1, #found, 2 do
    local state = found[at] ~= '*' and sub(found[at + 1], 11, 11)
    if state == RUNNING and how == 'until_done' then return true end
    if state == WAITING then
      local rest = cmsgpack.unpack(sub(found[at + 1], 12))
      local expires = tonumber(rest[expires_at])
      if (how == 'until_done' or rest[attempt_at] == 1) and not (expires and expires <= now) then return true end
    end
  end
  return false
end

local told = {}
for _ = 1, tonumber(take()) do
  local id, place, fingerprint, window, kept = take(), take(), take(), take(), take()
  local unique, replace = take(), take() == '1'
  local verdict, replaces = '1', ''
  if place ~= '' then
    local key = root .. 'key:' .. place
    local known = call('HMGET', key, 'id', 'fingerprint', 'until', 'confirmed')
    local held = known[1] and tonumber(known[3]) > now and (unique == '' or holds(known[1], unique))
    if held and replace and known[1] ~= id then
      if call('EXISTS', record_of(id)) == 1 then
        -- Published before: what came after it keeps the key.
        known = {id, fingerprint}
      else
        held, replaces = false, known[1]
      end
    end
    if held then
      id = known[1]
      if known[2] ~= fingerprint then
        verdict = 'x'
      elseif known[4] == '1' then
        verdict = '0'
      end
    else
      call('HSET', key, 'id', id, 'fingerprint', fingerprint, 'until', unique == '' and now + window or 'inf',
        'confirmed', '0')
      if unique == '' then call('PEXPIRE', key, kept) else call('PERSIST', key) end
    end
  end
  for _ = 1, tonumber(take()) do
    local name, value, forget = take(), take(), take()
    if verdict == '1' and call('HEXISTS', record_of(id), name) == 0 then insert(id, name, value, forget) end
  end
  if verdict == '1' then
    if place ~= '' then call('HSET', record_of(id), '*', place) end
    local found = call('HGETALL', record_of(id))
    for at = 1, #found, 2 do
      if found[at] ~= '*' and (sub(found[at + 1], 9, 9) == '1' or sub(found[at + 1], 10, 10) == '1') then
        verdict = '0'
      end
    end
  end
  told[#told + 1] = verdict
  told[#told + 1] = id
  told[#told + 1] = replaces
end
return told
