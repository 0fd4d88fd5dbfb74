-- The broker has refused these: they and their keys are forgotten, unless another publish got through.
local states = take()
for _ = 1, tonumber(take()) do
  local id = take()
  local key = key_of(id)
  local found = call('HGETALL', record_of(id))
  local gone = false
  for at = 1, #found, 2 do
    local head = sub(found[at + 1], 9, 11)
    if found[at] ~= '*' and sub(head, 1, 2) == '00' and string.find(states, sub(head, 3), 1, true) then
      remove(id, found[at])
      gone = true
    end
  end
  if gone and key then call('DEL', key) end
end
