// The pages of a night and of a team: chart, filter and sort of the table, and what runs right now.
"use strict";

const PERIOD = 2000; // milliseconds between two requests for the run in progress
const night = document.getElementById("night");
const { page: address, api } = night.dataset;
const pageOf = (tree) => "?tree=" + encodeURIComponent(tree);
const query = pageOf(night.dataset.tree);
const rows = () => [...document.querySelectorAll("#table tbody tr")];
const cell = (row, key) => row.querySelector(".c-" + key).textContent.trim();
let sorted = { key: "number", ascending: true };

// --- the chart

async function draw() {
  const chart = document.getElementById("chart");
  if (!(await drawChart(chart, api + "/chart" + query))) return;
  chart.removeAllListeners("plotly_click");
  chart.on("plotly_click", (event) => {
    const [, commit, , , , page] = event.points[0].customdata || []; // page: of a team, null if its tree is elsewhere
    if (page === null || !/^[0-9a-f]{4,40}$/.test(commit)) return;
    location.href = "/experiment/" + commit + (page ? pageOf(page) : query);
  });
}

// --- the table

function filter() {
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const status = document.getElementById("status").value;
  let shown = 0;
  for (const row of rows()) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word)) || (status !== "" && cell(row, "status") !== status);
    shown += !row.hidden;
  }
  document.getElementById("shown").textContent = shown + " of " + rows().length;
}

function sort() {
  const { key, ascending } = sorted;
  const text = ["found_by", "commit", "status", "description"].includes(key);
  const keyed = rows().map((row) => [text ? cell(row, key).toLowerCase() : parseFloat(cell(row, key)), row]);
  const missing = (value) => !text && Number.isNaN(value); // crashes come last in either order
  keyed.sort(([a], [b]) => {
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    return (a < b ? -1 : a > b ? 1 : 0) * (ascending ? 1 : -1);
  });
  document.querySelector("#table tbody").append(...keyed.map(([, row]) => row));
  for (const button of document.querySelectorAll("[data-sort]")) {
    const head = button.closest("th");
    if (button.dataset.sort === key) head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  }
}

// --- live updates

function show(live) {
  if (live.members) return showMembers(live.members);
  document.getElementById("live").dataset.running = live.running ? "yes" : "no";
  const shown = {
    stage: live.running ? live.stage : "none in progress",
    step: live.step === null ? "–" : live.step.toLocaleString("en"),
    loss: live.loss === null ? "–" : live.loss.toFixed(4),
    tokens_per_second: live.tokens_per_second === null ? "–" : live.tokens_per_second.toLocaleString("en"),
    seconds_left: live.seconds_left === null ? "–" : live.seconds_left + " s",
  };
  for (const [key, value] of Object.entries(shown)) {
    document.querySelector("[data-live=" + key + "]").textContent = value;
  }
  document.getElementById("bar").style.width = (live.percent || 0) + "%";
}

function showMembers(members) {
  const now = new Map(members.map((member) => [member.name, member.runs_now]));
  for (const row of document.querySelectorAll("#trees tr")) {
    row.querySelector(".now").textContent = now.get(row.dataset.member) || "";
  }
}

async function renew() {
  const answer = await fetch(address + query);
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const focused = document.activeElement.closest("#table tbody a")?.getAttribute("href");
  for (const part of ["#said", "#facts", "#trees", "#ideas", "#table tbody", "#notes"]) {
    document.querySelector(part)?.replaceWith(page.querySelector(part));
  }
  document.getElementById("table").className = page.getElementById("table").className;
  const status = document.getElementById("status");
  const chosen = status.value;
  status.replaceChildren(...page.getElementById("status").children);
  status.value = chosen;
  if (status.selectedIndex < 0) status.value = "";
  night.dataset.version = page.getElementById("night").dataset.version;
  sort();
  filter();
  if (focused) rows().flatMap((row) => [...row.querySelectorAll("a")]).find((a) => a.getAttribute("href") === focused)?.focus();
  await draw();
}

async function look() {
  if (!document.hidden) {
    try {
      const answer = await fetch(api + "/live" + query);
      if (!answer.ok) throw new Error(answer.status);
      const live = await answer.json();
      show(live);
      if (live.version !== night.dataset.version) await renew();
    } catch {
      for (const cell of document.querySelectorAll("[data-live=stage], .now")) cell.textContent = "the dashboard does not answer";
    }
  }
  setTimeout(look, PERIOD);
}

document.getElementById("filter").addEventListener("input", filter);
document.getElementById("status").addEventListener("change", filter);
for (const button of document.querySelectorAll("[data-sort]")) {
  button.addEventListener("click", () => {
    const key = button.dataset.sort;
    sorted = { key, ascending: sorted.key === key ? !sorted.ascending : true };
    sort();
  });
}
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
look();
