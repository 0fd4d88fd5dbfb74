-- Redrive or discard dead letters. Answers the ids of those that were dead until now.
local s = open_declared(take())
if not s then return redis.error_reply('GONE no such subscription') end
local discard, ordered, moved = take() == 'discard', take() == '1', {}
for _ = 1, tonumber(take()) do
  local id = take()
  if call('ZSCORE', s.dead, id) then
    -- Of a letter that the server has deleted there is nothing left to redrive.
    local gone = call('EXISTS', s.message .. id) == 0
    if discard or not gone then moved[#moved + 1] = id end
    if discard or gone then
      drop(s, id)
    else
      call('HINCRBY', s.message .. id, 'redriven', 1)
      -- Whoever redrives wants it handled: an expiry that passed meanwhile would drop it.
      call('HDEL', s.message .. id, 'expires')
      revive(s, id, ordered)
    end
  end
end
if #moved > 0 and not discard then ring(s) end
return moved
