"""A line's atomic operations, as Lua scripts, which Redis runs completely or not at all.

An entry that leaves the waiting list, and an answer that is removed, is subtracted from its sum of bytes. For an empty list the
sum is set to 0, so that an error in the sum does not last.
"""

# Returns {1, whether to ring} or, if too many bytes are held, {0, bytes held}. The order's parts were set before.
ADMIT = """
local waiting, bytes, answers, answer_bytes, listening, rung, head, tensors, state = unpack(KEYS)
local entry, size, limit, now, keep_ms, deadline, ring_ms = unpack(ARGV)
while true do
  local first = redis.call('LINDEX', waiting, 0)
  if not first then redis.call('DEL', bytes) break end
  local first_size, first_deadline = string.match(first, '^%S+ %S+ (%d+) (%S+)$')
  if tonumber(first_deadline) > tonumber(now) then break end
  redis.call('LPOP', waiting)
  redis.call('DECRBY', bytes, first_size)
end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', answers, '-inf', now)) do
  redis.call('ZREM', answers, member)
  redis.call('DECRBY', answer_bytes, string.match(member, '^%d+'))
end
if redis.call('ZCARD', answers) == 0 then redis.call('DEL', answer_bytes) end
local held = tonumber(redis.call('GET', bytes) or 0) + tonumber(redis.call('GET', answer_bytes) or 0)
if held > 0 and held + tonumber(size) > tonumber(limit) then
  redis.call('UNLINK', head, tensors)
  return {0, held}
end
redis.call('RPUSH', waiting, entry)
redis.call('INCRBY', bytes, size)
redis.call('SET', state, deadline, 'PX', keep_ms)
local ring = redis.call('EXISTS', listening) == 0 and redis.call('SET', rung, 1, 'NX', 'PX', ring_ms)
return {1, ring and 1 or 0}
"""

# Whether to ring: requests wait, no worker is in its loop, and nobody has just rung.
RING = """
local waiting, listening, rung = unpack(KEYS)
if redis.call('LLEN', waiting) == 0 or redis.call('EXISTS', listening) == 1 then return 0 end
return redis.call('SET', rung, 1, 'NX', 'PX', ARGV[1]) and 1 or 0
"""

# ARGV: how many more entries may be taken, then the entries already taken. Returns all of them.
TAKE = """
local waiting, bytes, taken = unpack(KEYS)
local entries = {}
for place = 2, #ARGV do entries[#entries + 1] = ARGV[place] end
for _ = 1, tonumber(ARGV[1]) do
  local entry = redis.call('LMOVE', waiting, taken, 'LEFT', 'RIGHT')
  if not entry then break end
  entries[#entries + 1] = entry
end
for _, entry in ipairs(entries) do
  redis.call('DECRBY', bytes, string.match(entry, '^%S+ %S+ (%d+) '))
end
if redis.call('LLEN', waiting) == 0 then redis.call('DEL', bytes) end
return entries
"""

# Returns the state. An answer is subtracted from the sums and moved to the key from which it is fetched.
COLLECT = """
local answers, answer_bytes, answer, state, handed = unpack(KEYS)
local deadline, size = redis.call('GET', state), redis.call('STRLEN', answer)
if size > 0 then
  if redis.call('ZREM', answers, size .. ' ' .. answer) == 1 then redis.call('DECRBY', answer_bytes, size) end
  redis.call('RENAME', answer, handed)
  redis.call('PEXPIRE', handed, ARGV[1])
  redis.call('UNLINK', state)
end
return deadline
"""

# ARGV: a living worker's id, the seconds without a sign of life after which a worker is dead, the prefix of the `taken` keys.
# Entries taken by dead workers go back to the head of the queue, in their order. Returns how many.
ALIVE = """
local waiting, bytes, workers = unpack(KEYS)
local worker, patience, prefix = unpack(ARGV)
local now = tonumber(redis.call('TIME')[1])
redis.call('ZADD', workers, now, worker)
local back = 0
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', workers, '-inf', now - tonumber(patience))) do
  while true do
    local entry = redis.call('LMOVE', prefix .. gone, waiting, 'RIGHT', 'LEFT')
    if not entry then break end
    redis.call('INCRBY', bytes, string.match(entry, '^%S+ %S+ (%d+) '))
    back = back + 1
  end
  redis.call('ZREM', workers, gone)
end
return back
"""
