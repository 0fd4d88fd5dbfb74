-- Dead letters, oldest first: those of the ids given, or a page.
local s = open_declared(take())
if not s then return redis.error_reply('GONE no such subscription') end
local after, limit, given = take(), tonumber(take()), tonumber(take())
local ids = {}
if given >= 0 then
  local deaths = {}
  for _ = 1, given do
    local id = take()
    local death = call('ZSCORE', s.dead, id)
    if death and not deaths[id] then
      deaths[id] = tonumber(death)
      ids[#ids + 1] = id
    end
  end
  table.sort(ids, function(one, other) return deaths[one] < deaths[other] end)
else
  -- One that was redriven meanwhile still has its place.
  local last = after ~= '' and call('HGET', s.message .. after, 'death') or '0'
  ids = call('ZRANGEBYSCORE', s.dead, '(' .. last, '+inf', 'LIMIT', 0, limit)
end
local answer = {}
for _, id in ipairs(ids) do
  answer[#answer + 1] = id
  answer[#answer + 1] = call('HGETALL', s.message .. id)
end
return answer
