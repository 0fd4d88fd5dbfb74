-- Before publishing: the key of each message leads to it or to the first, and whoever gets it has a record.
-- For each answers '1' (publish), '0' (the broker has it) or 'x' (conflict), and its id.
local now = tonumber(take())
local told = {}
for _ = 1, tonumber(take()) do
  local id, place, fingerprint, window, kept = take(), take(), take(), take(), take()
  local verdict = '1'
  if place ~= '' then
    local key = root .. 'key:' .. place
    local known = call('HMGET', key, 'id', 'fingerprint', 'until', 'confirmed')
    if known[1] and tonumber(known[3]) > now then
      id = known[1]
      if known[2] ~= fingerprint then
        verdict = 'x'
      elseif known[4] == '1' then
        verdict = '0'
      end
    else
      call('HSET', key, 'id', id, 'fingerprint', fingerprint, 'until', now + tonumber(window), 'confirmed', '0')
      call('PEXPIRE', key, kept)
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
end
return told
