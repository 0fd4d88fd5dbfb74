-- Forget a subscription that was declared.
call('HDEL', KEYS[1], 'sub:' .. take())
call('HINCRBY', KEYS[1], 'version', 1)
