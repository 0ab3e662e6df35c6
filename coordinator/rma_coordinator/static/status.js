// The status page: asks the admin API every few seconds with the reader's key and shows what it says.
"use strict";

const EVERY_MS = 3000;
const SLOWEST_MS = 30000;
const $ = (id) => document.getElementById(id);
const marks = { healthy: ["● ", "good"], degraded: ["▲ ", "warn"], offline: ["■ ", "none"] };
let key = sessionStorage.getItem("rma-key") || "";
let updated = 0;
let failures = 0;
let timer = 0;

// The address `rma up` prints carries the key behind #, which is never sent; it is taken out of sight at once.
const given = new URLSearchParams(location.hash.slice(1)).get("key");
if (given) {
  key = given;
  sessionStorage.setItem("rma-key", key);
  history.replaceState(null, "", location.pathname);
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function ago(when) {
  if (!when) return "never";
  const seconds = Math.max(0, (Date.now() - Date.parse(when)) / 1000);
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 129600 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} d ago`;
}

async function ask(path) {
  const answer = await fetch(path, {
    headers: { Authorization: `Bearer ${key}` }, cache: "no-store", signal: AbortSignal.timeout(10000),
  });
  if (answer.ok) return answer.json();
  const problem = await answer.json().catch(() => ({ detail: `the coordinator answered ${answer.status}` }));
  const error = new Error(problem.detail);
  error.credential = answer.status === 401 || answer.status === 403;
  throw error;
}

function table(place, columns, rows, empty) {
  if (!rows.length) {
    place.replaceChildren(empty);
    return;
  }
  const made = element("table");
  const head = made.createTHead().insertRow();
  for (const column of columns) {
    const cell = element("th", column);
    cell.scope = "col";
    head.append(cell);
  }
  const body = made.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const cell of row) {
      const made = line.insertCell();
      if (typeof cell === "number") { made.className = "num"; made.textContent = cell; }
      else if (cell instanceof Node) made.append(cell);
      else made.textContent = cell ?? "–";
    }
  }
  const scroll = element("div", null, "scroll");
  scroll.tabIndex = 0;
  scroll.append(made);
  place.replaceChildren(scroll);
}

function two(main, small, className) {
  const both = document.createDocumentFragment();
  both.append(element("span", main, className));
  if (small) both.append(element("small", small));
  return both;
}

function hint(before, command, after) {
  const made = element("p", before + " ", "empty");
  made.append(element("code", command), " " + after);
  return made;
}

function state(worker) {
  const [mark, colour] = marks[worker.status] || ["", ""];
  const word = worker.draining ? `${worker.status}, draining` : worker.status;
  return two(mark + word, worker.status_reason, `state ${colour}`);
}

function running(worker) {
  if (!worker.containers.length) return "–";
  const list = document.createDocumentFragment();
  for (const c of worker.containers) {
    const colour = c.state === "healthy" ? "good" : c.state === "failed" || c.state === "refused" ? "bad" : "warn";
    const progress = c.progress ? ` ${Math.round(c.progress * 100)} %` : "";
    const where = c.runtime ? ` (${c.runtime})` : "";
    const line = element("div");
    line.append(two(`${c.service}: ${c.state}${progress}${where}`, c.reason, colour));
    list.append(line);
  }
  return list;
}

function show(stats, workers, services, tasks) {
  const numbers = [
    ["Machines", stats.total_workers], ["Healthy", stats.healthy_workers], ["Degraded", stats.degraded_workers],
    ["Offline", stats.offline_workers], ["Waiting", stats.tasks.queued], ["Running", stats.tasks.running],
    ["Answered", stats.tasks.succeeded], ["Failed", stats.tasks.failed],
  ];
  $("numbers").replaceChildren(...numbers.map(([name, value]) => {
    const card = element("div");
    const bad = value > 0 && (name === "Failed" ? "bad" : name === "Degraded" ? "warn" : "");
    card.append(element("dt", name), element("dd", value, bad || ""));
    return card;
  }));
  table($("workers"), ["Machine", "State", "Tier", "Hardware", "Runs", "Load", "Tasks", "Seen"],
    workers.workers.map((w) => [
      element("code", w.worker_id), state(w), two(w.tier ? `Tier ${w.tier}` : "no tier", w.tier_reason),
      two(`${w.capabilities.cpu_cores} cores, ${w.capabilities.ram}`,
        [w.capabilities.gpu_type, w.capabilities.gpu_memory].filter(Boolean).join(", ")),
      running(w), `${Math.round(w.current_load * 100)} %`, w.tasks_completed, ago(w.last_heartbeat),
    ]),
    hint("No machines yet. Make a token with", "rma tokens create", "and run the line it prints on the machine that should join."));
  table($("services"), ["Service", "Wanted", "Assigned", "Healthy"],
    services.services.map((s) => [two(s.service, s.reasons.slice(0, 1).map((r) => r.reason).join("")), s.wanted, s.assigned,
      element("span", s.healthy, s.healthy ? "good" : "bad")]),
    element("p", "The catalog is empty.", "empty"));
  table($("tasks"), ["Request", "Service", "Result", "Machine", "Took", "When"],
    tasks.tasks.map((t) => {
      const last = t.attempts[t.attempts.length - 1];
      const colour = { succeeded: "good", failed: "bad", cancelled: "none" }[t.status] || "warn";
      return [element("code", t.task_id), t.service, two(t.status, t.reasons.join("; "), colour),
        last ? element("code", last.worker_id) : "–", `${t.seconds.toFixed(2)} s`, ago(t.created_at)];
    }),
    hint("No requests yet. Try", "rma infer notes FILE", "with a PDF, a DOCX or a page of HTML."));
}

function login(message) {
  $("pool").hidden = true;
  $("login").hidden = false;
  $("forget").hidden = true;
  $("refused").textContent = message || "";
}

async function round() {
  clearTimeout(timer);
  if (!key) { login(); return; }
  if (document.hidden) return;
  try {
    const [stats, workers, services, tasks] = await Promise.all([
      ask("/api/admin/stats"), ask("/api/admin/workers?limit=200"), ask("/api/admin/services"), ask("/api/admin/tasks?limit=20"),
    ]);
    show(stats, workers, services, tasks);
    $("login").hidden = true;
    $("pool").hidden = false;
    $("forget").hidden = false;
    $("trouble").hidden = true;
    document.body.classList.remove("stale");
    updated = Date.now();
    failures = 0;
  } catch (error) {
    if (error.credential) { key = ""; sessionStorage.removeItem("rma-key"); login(error.message); return; }
    failures += 1;
    $("trouble").textContent = updated
      ? `No answer from the coordinator since ${new Date(updated).toLocaleTimeString()}. Showing the last known state.`
      : `No answer from the coordinator: ${error.message}`;
    $("trouble").hidden = false;
    $("pool").hidden = false;
    document.body.classList.add("stale");
  }
  timer = setTimeout(round, Math.min(SLOWEST_MS, EVERY_MS * 2 ** Math.min(failures, 4)));
}

setInterval(() => {
  $("fresh").textContent = updated ? `Updated ${Math.round((Date.now() - updated) / 1000)} s ago` : "Not loaded yet";
}, 1000);
document.addEventListener("visibilitychange", () => { if (!document.hidden) round(); });
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  sessionStorage.setItem("rma-key", key);
  round();
});
$("forget").addEventListener("click", () => { key = ""; sessionStorage.removeItem("rma-key"); login("The key is forgotten."); });
round();
