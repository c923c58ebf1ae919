"""What the Redis read store does atomically: Lua scripts, each one step of which others see all or nothing.

Each is called with one key, how the names of the projection's (or version's) keys begin, and one argument in
MessagePack. A script looks at all that could keep it from its work before it writes anything, since Redis doesn't take
back what a script that fails has written. No number that counts is ever calculated with here: Lua's are doubles.
"""

#: A script begins so; then Redis refuses it before it begins where memory has run out, or on a replica.
_WRITES = "#!lua\n"
#: Or so, and runs then, too: what takes next to nothing, so that versions go, and memory with them, and lag is told.
_MANAGES = "#!lua flags=allow-oom\n"
_READS = "#!lua flags=no-writes\n"

#: Positions are compared as decimal texts.
_POSITIONS = """
local function before(a, b)
  if #a ~= #b then return #a < #b end
  return a < b
end
"""

#: How many events of a version have none: they are parked, or were discarded.
_WITHOUT_EFFECT = """
local function without_effect(base, version)
  local discarded = redis.call('HGET', base .. 'discards', version) or 0
  return redis.call('HLEN', base .. version .. ':parked') + discarded
end
"""

#: What is asked about the parked events of a projection; nothing of one that isn't there.
_ASKED = """
local base, asked = KEYS[1], cmsgpack.unpack(ARGV[1])
if redis.call('EXISTS', base .. 'claim') == 0 then return {'unclaimed'} end
"""

CLAIM = (
    _MANAGES
    + """
local base, uid = KEYS[1], ARGV[1]
local owner = redis.call('HGET', base .. 'claim', 'uid')
if owner and owner ~= '' and owner ~= uid then return owner end
redis.call('HSET', base .. 'claim', 'uid', uid)
return ''
"""
)

RELEASE = (
    _MANAGES
    + """
local base, uid = KEYS[1], ARGV[1]
if redis.call('HGET', base .. 'claim', 'uid') ~= uid then return 0 end
redis.call('HSET', base .. 'claim', 'uid', '')
return 1
"""
)

#: Answers 'unclaimed', 'dropping', 'made', or 'there' with the indexes and the definition, so all of one moment.
ENSURE_VERSION = (
    _MANAGES
    + """
local base, asked = KEYS[1], cmsgpack.unpack(ARGV[1])
local version, prefix = asked.version, base .. asked.version .. ':'
if redis.call('EXISTS', base .. 'claim') == 0 then return {'unclaimed'} end
if redis.call('HEXISTS', base .. 'dropping', version) == 1 then return {'dropping'} end
local made = redis.call('HSETNX', base .. 'definitions', version, asked.definition)
if made == 1 then
  local time = redis.call('TIME')
  redis.call('HSET', base .. 'created', version, time[1] .. '.' .. string.format('%06d', time[2]))
  for _, partition in ipairs(asked.partitions) do
    redis.call('HSET', prefix .. 'positions', partition[1], '0')
    -- Where the version has an end, that is the head from the beginning: there is nothing else to see.
    if partition[2] then
      redis.call('HSET', prefix .. 'seen', partition[1], partition[2] .. ' 0.0 ' .. time[1])
    end
  end
  redis.call('SET', prefix .. 'indexes', asked.indexes)
end
if redis.call('EXISTS', base .. 'live') == 0 then redis.call('SET', base .. 'live', version) end
if made == 1 then return {'made'} end
return {'there', redis.call('GET', prefix .. 'indexes'), redis.call('HGET', base .. 'definitions', version)}
"""
)

#: Puts other indexes, and where it is given the definition, in the place of those that were read; answers whether.
SET_INDEXES = (
    _WRITES
    + """
local base, asked = KEYS[1], cmsgpack.unpack(ARGV[1])
local indexes = base .. asked.version .. ':indexes'
if redis.call('GET', indexes) ~= asked.before then return 0 end
redis.call('SET', indexes, asked.after)
if asked.definition ~= '' then redis.call('HSET', base .. 'definitions', asked.version, asked.definition) end
return 1
"""
)

#: Puts rows into an index, as far as they weren't written since they were read: whoever writes one does it too.
FILL_INDEX = (
    _WRITES
    + """
local prefix, asked = KEYS[1], cmsgpack.unpack(ARGV[1])
for _, row in ipairs(asked.rows) do
  local name = prefix .. 'row:' .. row[1]
  if redis.call('HGET', name, '~') == row[2] then
    redis.call('HSET', name, '=' .. asked.column, row[3])
    redis.call('ZADD', prefix .. 'by:' .. asked.column, 0, row[3] .. row[1])
  end
end
"""
)

#: Answers 'none', 'live' or whether the version may be read now.
SWAP = (
    _MANAGES
    + _POSITIONS
    + _WITHOUT_EFFECT
    + """
local base, version = KEYS[1], ARGV[1]
if redis.call('HEXISTS', base .. 'definitions', version) == 0 then return 'none' end
local live = redis.call('GET', base .. 'live')
if live == version then return 'live' end
if live then
  local old, new = base .. live .. ':', base .. version .. ':'
  local positions = redis.call('HGETALL', new .. 'positions')
  for at = 1, #positions, 2 do
    local field, position = positions[at], positions[at + 1]
    local wanted = redis.call('HGET', old .. 'positions', field)
    if not wanted then
      local seen = redis.call('HGET', new .. 'seen', field)
      if not seen then return 'behind' end
      wanted = string.match(seen, '^%d+')
    end
    if before(position, wanted) then return 'behind' end
  end
  if without_effect(base, version) > without_effect(base, live) then return 'behind' end
  local time = redis.call('TIME')
  redis.call('HSET', base .. 'retired', live, time[1] .. '.' .. string.format('%06d', time[2]))
end
redis.call('HDEL', base .. 'retired', version)
redis.call('SET', base .. 'live', version)
return 'live'
"""
)

#: Tells how a version stands beside the live one, for a `Standing`: nothing where no other one is live.
STANDING = (
    _READS
    + _WITHOUT_EFFECT
    + """
local base, version = KEYS[1], ARGV[1]
local live = redis.call('GET', base .. 'live')
if not live or live == version then return {{}, {}, {}, 0, 0} end
return {
  redis.call('HGETALL', base .. version .. ':positions'), redis.call('HGETALL', base .. version .. ':seen'),
  redis.call('HGETALL', base .. live .. ':positions'), without_effect(base, version), without_effect(base, live)
}
"""
)

#: Holds the live version back for so many milliseconds: nothing of a batch of it is written.
HOLD = (
    _MANAGES
    + """
local base, milliseconds = KEYS[1], ARGV[1]
local live = redis.call('GET', base .. 'live')
if live then redis.call('SET', base .. 'held', live, 'PX', milliseconds) end
"""
)

#: Takes a version away from all who read and write it; its rows go later. Answers 'live', 'none' or 'dropping'.
BEGIN_DROP = (
    _MANAGES
    + """
local base, version, force = KEYS[1], ARGV[1], ARGV[2]
local prefix = base .. version .. ':'
if redis.call('GET', base .. 'live') == version then
  if force ~= 'force' then return 'live' end
  redis.call('DEL', base .. 'live')
end
local definition = redis.call('HGET', base .. 'definitions', version)
if definition then
  redis.call('HSET', base .. 'dropping', version, definition)
  redis.call('HDEL', base .. 'definitions', version)
  redis.call('HDEL', base .. 'created', version)
  redis.call('HDEL', base .. 'retired', version)
  local names = {
    'positions', 'recorded', 'hints', 'seen', 'stopped', 'parked', 'asked', 'errors', 'unparked', 'indexes'
  }
  for _, name in ipairs(names) do redis.call('DEL', prefix .. name) end
elseif redis.call('HEXISTS', base .. 'dropping', version) == 0 then
  return 'none'
end
return 'dropping'
"""
)

#: Deletes a version's first rows; answers how many.
DROP_ROWS = (
    _MANAGES
    + """
local prefix = KEYS[1]
local keys = redis.call('ZRANGE', prefix .. 'keys', 0, tonumber(ARGV[1]) - 1)
for _, key in ipairs(keys) do redis.call('UNLINK', prefix .. 'row:' .. key) end
if #keys > 0 then redis.call('ZREM', prefix .. 'keys', unpack(keys)) end
return #keys
"""
)

#: All that tells how far the versions are: by version, of one moment.
STATUS = (
    _READS
    + """
local base = KEYS[1]
local versions = {}
local definitions = redis.call('HKEYS', base .. 'definitions')
for _, version in ipairs(definitions) do
  local prefix = base .. version .. ':'
  local first, error = nil, false
  for _, id in ipairs(redis.call('HKEYS', prefix .. 'parked')) do
    if not first or tonumber(id) < tonumber(first) then first = id end
  end
  if first then
    error = {redis.call('HGET', prefix .. 'errors', first), redis.call('HGET', prefix .. 'parked', first)}
  end
  versions[#versions + 1] = {
    version, redis.call('HGET', base .. 'created', version), redis.call('HGET', base .. 'retired', version),
    redis.call('HLEN', prefix .. 'parked'), redis.call('HGET', base .. 'discards', version), error,
    redis.call('HGETALL', prefix .. 'positions'), redis.call('HGETALL', prefix .. 'recorded'),
    redis.call('HGETALL', prefix .. 'seen'), redis.call('HGETALL', prefix .. 'stopped')
  }
end
return {redis.call('EXISTS', base .. 'claim'), redis.call('GET', base .. 'live'), redis.call('TIME'), versions}
"""
)

#: Fields of rows, in the order of the keys.
FIELDS = (
    _READS
    + """
local prefix, asked = KEYS[1], cmsgpack.unpack(ARGV[1])
local rows = {}
for at, key in ipairs(asked.keys) do
  rows[at] = redis.call('HMGET', prefix .. 'row:' .. key, unpack(asked.fields))
end
return rows
"""
)

#: A batch. Answers '' where it is written, else what keeps it from being so: 'held', 'indexes', 'row', or a position.
APPLY = (
    _WRITES
    + """
local prefix, batch = KEYS[1], cmsgpack.unpack(ARGV[1])
if redis.call('GET', batch.base .. 'held') == batch.version then return 'held' end
if redis.call('GET', prefix .. 'indexes') ~= batch.indexes then return 'indexes' end
for _, advance in ipairs(batch.advances) do
  local position = redis.call('HGET', prefix .. 'positions', advance[1])
  if position ~= advance[2] then return advance[1] .. ' at ' .. (position or 'nothing') end
  local unparked = redis.call('HGET', prefix .. 'unparked', advance[1]) or '0'
  if unparked ~= advance[6] then return advance[1] .. ' after ' .. unparked .. ' departures of parked events' end
end
local settled = batch.settled
if settled then
  if settled.live and redis.call('GET', batch.base .. 'live') ~= batch.version then return 'a version not live' end
  for _, id in ipairs(settled.ids) do
    if redis.call('HEXISTS', prefix .. 'parked', id) == 0 then return 'no parked event ' .. id end
  end
end
for _, row in ipairs(batch.read) do
  if (redis.call('HGET', prefix .. 'row:' .. row[1], '~') or '') ~= row[2] then return 'row' end
end
for _, advance in ipairs(batch.advances) do
  redis.call('HSET', prefix .. 'positions', advance[1], advance[3])
  redis.call('HSET', prefix .. 'hints', advance[1], advance[4])
  if advance[5] ~= '' then redis.call('HSET', prefix .. 'recorded', advance[1], advance[5]) end
  redis.call('HDEL', prefix .. 'stopped', advance[1])
end
for _, row in ipairs(batch.rows) do
  local key, set, unset = row[1], row[2], row[3]
  local name = prefix .. 'row:' .. key
  if not set then
    redis.call('DEL', name)
    redis.call('ZREM', prefix .. 'keys', key)
  else
    redis.call('HSET', name, '~', batch.mark, unpack(set))
    if #unset > 0 then redis.call('HDEL', name, unpack(unset)) end
    if row[4] then redis.call('ZADD', prefix .. 'keys', 0, key) end
  end
  local moves = row[5]
  for at = 1, #moves, 3 do
    local index = prefix .. 'by:' .. moves[at]
    if moves[at + 1] ~= '' then redis.call('ZREM', index, moves[at + 1] .. key) end
    if moves[at + 2] ~= '' then redis.call('ZADD', index, 0, moves[at + 2] .. key) end
  end
end
if settled then
  for id, trace in pairs(settled.discarded) do
    local event = redis.call('HGET', prefix .. 'parked', id)
    redis.call('HSET', batch.base .. 'discarded', id, '{"trace":' .. trace .. ',"event":' .. event .. '}')
    redis.call('HINCRBY', batch.base .. 'discards', batch.version, 1)
  end
  for _, id in ipairs(settled.ids) do
    for _, name in ipairs({'parked', 'asked', 'errors'}) do redis.call('HDEL', prefix .. name, id) end
  end
  redis.call('HINCRBY', prefix .. 'unparked', settled.partition, 1)
end
for _, parked in ipairs(batch.parked) do
  local id = string.format('%.0f', redis.call('INCR', batch.base .. 'parked-id'))
  redis.call('HSET', prefix .. 'parked', id, parked)
end
return ''
"""
)

#: Heads and lags that a projector saw, with the time, in partitions of the version.
SEE = (
    _MANAGES
    + """
local prefix, asked = KEYS[1], cmsgpack.unpack(ARGV[1])
local time = redis.call('TIME')
for _, seen in ipairs(asked.seen) do
  if redis.call('HEXISTS', prefix .. 'positions', seen[1]) == 1 then
    redis.call('HSET', prefix .. 'seen', seen[1], seen[2] .. ' ' .. time[1] .. '.' .. string.format('%06d', time[2]))
  end
end
"""
)

STOP = (
    _MANAGES
    + """
local prefix, field, reason = KEYS[1], ARGV[1], ARGV[2]
if reason == '' then redis.call('HDEL', prefix .. 'stopped', field)
elseif redis.call('HEXISTS', prefix .. 'positions', field) == 1 then
  redis.call('HSET', prefix .. 'stopped', field, reason)
end
"""
)

#: What tells whether something may be asked of parked events: how many marks there are, what changes with each event
#: that is parked in any version, and how many were discarded.
ASKED = (
    _READS
    + """
local prefix, base = KEYS[1], ARGV[1]
return {
  redis.call('HLEN', prefix .. 'asked'), redis.call('GET', base .. 'parked-id'), redis.call('HLEN', base .. 'discarded')
}
"""
)

#: Of parked events: all of them, marks (`token time JSON`), errors that took the place of the first ones, the time; and
#: what was discarded of any version.
PARKED = (
    _READS
    + """
local prefix, base = KEYS[1], ARGV[1]
return {
  redis.call('HGETALL', prefix .. 'parked'), redis.call('HGETALL', prefix .. 'asked'),
  redis.call('HGETALL', prefix .. 'errors'), redis.call('TIME'), redis.call('HVALS', base .. 'discarded')
}
"""
)

#: Takes marks off; the first event has another error now, where one is given.
REFUSE = (
    _WRITES
    + """
local prefix, asked = KEYS[1], cmsgpack.unpack(ARGV[1])
if asked.error and redis.call('HEXISTS', prefix .. 'parked', asked.first) == 1 then
  redis.call('HSET', prefix .. 'errors', asked.first, asked.error)
end
for id, token in pairs(asked.marks) do
  local mark = redis.call('HGET', prefix .. 'asked', id)
  if mark and string.match(mark, '^%S+') == token then redis.call('HDEL', prefix .. 'asked', id) end
end
"""
)

#: Answers 'unclaimed', or what a version has parked, with errors, and all that was discarded of any version.
ASIDE = (
    _READS
    + _ASKED
    + """
local prefix = base .. asked.version .. ':'
return {'ok', redis.call('HGETALL', prefix .. 'parked'), redis.call('HGETALL', prefix .. 'errors'),
  redis.call('HVALS', base .. 'discarded')}
"""
)

#: Answers 'unclaimed', 'none' (no such version), or the version, its definition, parked events and errors.
LIST_PARKED = (
    _READS
    + _ASKED
    + """
local version = asked.version or redis.call('GET', base .. 'live')
local definition = version and redis.call('HGET', base .. 'definitions', version)
if not definition then return {'none'} end
local prefix = base .. version .. ':'
return {'ok', version, definition, redis.call('HGETALL', prefix .. 'parked'), redis.call('HGETALL', prefix .. 'errors')}
"""
)

#: Leaves a mark. Answers the wanted version, the one that the event is parked in, and whether the mark is there.
ASK = (
    _WRITES
    + _ASKED
    + """
local wanted, found = asked.version or redis.call('GET', base .. 'live'), false
for _, version in ipairs(redis.call('HKEYS', base .. 'definitions')) do
  if redis.call('HEXISTS', base .. version .. ':parked', asked.id) == 1 then found = version end
end
local done = 0
if found and found == wanted then
  local marks, now = base .. found .. ':asked', redis.call('TIME')
  local mark = redis.call('HGET', marks, asked.id)
  local token, at = string.match(mark or '', '^(%S+) (%d+)')
  if not mark or token == asked.token or now[1] - at > asked.valid then
    redis.call('HSET', marks, asked.id, asked.token .. ' ' .. now[1] .. ' ' .. asked.mark)
    done = 1
  end
end
return {'ok', wanted, found, done}
"""
)

#: All that tells what became of a parked event.
LOOK_PARKED = (
    _READS
    + _ASKED
    + """
local prefix = base .. asked.version .. ':'
local rows = {}
if redis.call('HEXISTS', prefix .. 'parked', asked.id) == 1 then rows = redis.call('HGETALL', prefix .. 'parked') end
return {
  'ok', redis.call('HGET', prefix .. 'asked', asked.id), redis.call('GET', base .. 'live'),
  redis.call('HEXISTS', base .. 'definitions', asked.version), redis.call('HEXISTS', base .. 'discarded', asked.id),
  rows, redis.call('HGETALL', prefix .. 'errors')
}
"""
)

WITHDRAW = (
    _WRITES
    + _ASKED
    + """
for _, version in ipairs(redis.call('HKEYS', base .. 'definitions')) do
  local mark = redis.call('HGET', base .. version .. ':asked', asked.id)
  if mark and string.match(mark, '^%S+') == asked.token then
    redis.call('HDEL', base .. version .. ':asked', asked.id)
    return {'ok', 1}
  end
end
return {'ok', 0}
"""
)

#: Where the partitions stand: positions, hints, why some are stopped, and how often parked events left.
POSITIONS = (
    _READS
    + """
local prefix = KEYS[1]
return {
  redis.call('HGETALL', prefix .. 'positions'), redis.call('HGETALL', prefix .. 'hints'),
  redis.call('HGETALL', prefix .. 'stopped'), redis.call('HGETALL', prefix .. 'unparked')
}
"""
)

#: What each read of a query begins with; `state` is the first part of its answer.
_STATE = """
local base, asked = KEYS[1], cmsgpack.unpack(ARGV[1])
local prefix = base .. asked.version .. ':'
if redis.call('HEXISTS', base .. 'definitions', asked.version) == 0 then return {'gone'} end
local state = {
  'ok', redis.call('GET', base .. 'live'), redis.call('HGETALL', prefix .. 'positions'),
  redis.call('HGETALL', prefix .. 'seen'), redis.call('HGETALL', prefix .. 'stopped'),
  redis.call('HGETALL', prefix .. 'unparked'), redis.call('TIME')
}
"""

LIVE = (
    _READS
    + """
local base = KEYS[1]
local live = redis.call('GET', base .. 'live')
if not live then return {} end
return {live, redis.call('HGET', base .. 'definitions', live)}
"""
)

STATUS_OF_VERSION = (
    _READS
    + _STATE
    + """
state[8] = redis.call('HLEN', prefix .. 'parked')
return state
"""
)

BY_KEYS = (
    _READS
    + _STATE
    + """
local rows = {}
for _, key in ipairs(asked.keys) do
  local row = redis.call('HMGET', prefix .. 'row:' .. key, unpack(asked.fields))
  if row[1] then rows[#rows + 1] = key; rows[#rows + 1] = row end
end
state[8] = rows
return state
"""
)

#: A page, see `redis_values.Scan`. Answers 'gone', 'index' (one isn't there), 'slow', or the rows in order.
PAGE = (
    _READS
    + _STATE
    + """
local indexes = ' ' .. redis.call('GET', prefix .. 'indexes') .. ' '
for _, column in ipairs(asked.needs) do
  if not string.find(indexes, ' ' .. column .. ':ready ', 1, true) then return {'index'} end
end

-- Bytes in their own order, whatever the server's locale.
local function less(a, b)
  if a == b then return false end
  for at = 1, math.min(#a, #b) do
    local x, y = string.byte(a, at), string.byte(b, at)
    if x ~= y then return x < y end
  end
  return #a < #b
end

local function within(member, ranges)
  for _, range in ipairs(ranges) do
    if not less(member, range[1]) and (range[2] == '' or less(member, range[2])) then return true end
  end
  return false
end

local function name(column) return prefix .. (column == '' and 'keys' or 'by:' .. column) end
local function first(range) return range[1] == '' and '-' or '[' .. range[1] end
local function last(range) return range[2] == '' and '+' or '(' .. range[2] end

local function count(scanned)
  local sum = 0
  for _, range in ipairs(scanned[2]) do
    sum = sum + redis.call('ZLEXCOUNT', name(scanned[1]), first(range), last(range))
  end
  return sum
end

local function key_of(member, column)
  if column == '' then return member end
  return string.sub(member, string.find(member, '\\0', 1, true) + 1)
end

local function member_of(key, column)
  if column == '' then return key end
  local place = redis.call('HGET', prefix .. 'row:' .. key, '=' .. column)
  return place and place .. key
end

local function meets(key, conditions, except)
  for _, condition in ipairs(conditions) do
    if condition ~= except then
      local member = member_of(key, condition[1])
      if not member or not within(member, condition[2]) then return false end
    end
  end
  return true
end

-- Along the order's index, until the page is full.
local function along()
  local found, looked = {}, 0
  local column, ranges, step = asked.along[1], asked.along[2], #asked.others == 0 and asked.most or 200
  local from, to, by = 1, #ranges, 1
  if asked.descending then from, to, by = #ranges, 1, -1 end
  for at = from, to, by do
    local low, high = first(ranges[at]), last(ranges[at])
    repeat
      local members
      if asked.descending then
        members = redis.call('ZREVRANGEBYLEX', name(column), high, low, 'LIMIT', 0, step)
      else
        members = redis.call('ZRANGEBYLEX', name(column), low, high, 'LIMIT', 0, step)
      end
      for _, member in ipairs(members) do
        local key = key_of(member, column)
        if meets(key, asked.others) then
          found[#found + 1] = key
          if #found == asked.most then return found end
        end
      end
      looked = looked + #members
      if #asked.others > 0 and looked >= asked.limit then return nil end
      if #members > 0 then
        if asked.descending then high = '(' .. members[#members] else low = '(' .. members[#members] end
      end
    until #members < step
  end
  return found
end

-- All rows of one condition, put in order.
local function among(condition)
  local members, column = {}, asked.along[1]
  for _, range in ipairs(condition[2]) do
    for _, member in ipairs(redis.call('ZRANGEBYLEX', name(condition[1]), first(range), last(range))) do
      local key = key_of(member, condition[1])
      if meets(key, asked.others, condition) then
        local place = member_of(key, column)
        if place and within(place, asked.along[2]) then members[#members + 1] = place end
      end
    end
  end
  table.sort(members, less)
  local found, total = {}, #members
  for at = 1, math.min(total, asked.most) do
    found[at] = key_of(members[asked.descending and total + 1 - at or at], column)
  end
  return found
end

local smallest, least = nil, asked.limit + 1
for _, condition in ipairs(asked.others) do
  local rows = count(condition)
  if rows < least then smallest, least = condition, rows end
end
local keys
if not smallest or count(asked.along) < least then keys = along() end
if not keys and smallest then keys = among(smallest) end
if not keys then return {'slow'} end
local rows = {}
for at, key in ipairs(keys) do rows[at] = {key, redis.call('HMGET', prefix .. 'row:' .. key, unpack(asked.fields))} end
state[8] = rows
return state
"""
)
