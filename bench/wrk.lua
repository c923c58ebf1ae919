-- Requests from a file for wrk: wrk -s wrk.lua URL -- FILE METHOD TOKEN
-- A line: path, or path TAB body-before-the-id TAB body-after-the-id; the threads take the lines by turns, from the first
-- again after the last, and each request has an id of its own. The result is one line of JSON.

local threads = 0

function setup(thread)
  thread:set("number", threads)
  threads = threads + 1
end

function init(args)
  lines, sent = {}, 0
  for line in io.lines(args[1]) do
    local path, before, after = line:match("^([^\t]*)\t?([^\t]*)\t?([^\t]*)$")
    lines[#lines + 1] = {path = path, before = before, after = after}
  end
  method = args[2]
  headers = {["Authorization"] = "Bearer " .. args[3], ["Content-Type"] = "application/json"}
end

function request()
  local line = lines[(2 * sent + number) % #lines + 1]
  sent = sent + 1
  if line.before == "" then return wrk.format(method, line.path, headers) end
  return wrk.format(method, line.path, headers, line.before .. number .. "-" .. sent .. line.after)
end

function done(summary, latency, requests)
  local errors = summary.errors
  local quantiles = {}
  for i = 0, 999 do quantiles[i + 1] = string.format("%.3f", latency:percentile(i / 10 + 0.05) / 1000) end
  io.write(string.format(
    '\n{"answered": %d, "refused": %d, "broken": %d, "seconds": %.6f, "quantiles_ms": [%s]}\n',
    summary.requests, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    summary.duration / 1e6, table.concat(quantiles, ", ")))
end
