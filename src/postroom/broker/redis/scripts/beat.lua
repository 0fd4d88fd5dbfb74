-- These holders of one process live. Answers how many connections the process is known by.
local process = take()
for _ = 1, tonumber(take()) do
  local s, holder = open_declared(take()), take()
  if s then beat(s, holder) end
end
return connections(process)
