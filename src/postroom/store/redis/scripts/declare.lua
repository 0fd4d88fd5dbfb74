-- Remember what was declared: field and value in turn. The version rises if it was news.
local changed = 0
for _ = 1, tonumber(take()) do
  local field, value = take(), take()
  if call('HGET', KEYS[1], field) ~= value then
    call('HSET', KEYS[1], field, value)
    changed = changed + 1
  end
end
if changed > 0 then call('HINCRBY', KEYS[1], 'version', 1) end
