-- Write each record if it is still what the writer has read (by its first 8 bytes; none: that there was none).
-- An empty value removes it. Answers 1 for each that was written.
local told = {}
for n = 1, tonumber(take()) do
  local id, name, read, value, forget = take(), take(), take(), take(), take()
  local found = call('HGET', record_of(id), name) or ''
  if sub(found, 1, 8) ~= read then
    told[n] = 0
  else
    if value == '' then
      remove(id, name)
    elseif found == '' then
      insert(id, name, value, forget)
    else
      call('HSET', record_of(id), name, value)
      call('ZREM', root .. 'ends', name .. ':' .. id)
      if forget ~= '' then call('ZADD', root .. 'ends', forget, name .. ':' .. id) end
    end
    -- Its publisher may have died before it could: the key must not let another through.
    if sub(value, 9, 9) == '1' and sub(found, 9, 9) ~= '1' then confirm_key(id) end
    told[n] = 1
  end
end
return told
