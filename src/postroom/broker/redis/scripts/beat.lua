-- These holders live.
for _ = 1, tonumber(take()) do
  local s, holder = open_declared(take()), take()
  if s then beat(s, holder) end
end
return 1
