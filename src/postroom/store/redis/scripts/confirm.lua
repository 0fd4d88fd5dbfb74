-- The broker has these: nobody need publish them again. The first argument begins what is written.
local mark = take()
for _ = 1, tonumber(take()) do
  local id = take()
  local found = call('HGETALL', record_of(id))
  for at = 1, #found, 2 do
    local value = found[at + 1]
    if found[at] ~= '*' and sub(value, 9, 9) == '0' then
      call('HSET', record_of(id), found[at], mark .. '1' .. sub(value, 10))
    end
  end
  confirm_key(id)
end
