// The API page: the OpenAPI document as a table.
"use strict";

function element(name, text) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  return made;
}

async function load() {
  const answer = await fetch("/openapi.json");
  const { paths } = await answer.json();
  const table = element("table");
  const head = table.createTHead().insertRow();
  for (const name of ["Call", "What it does", "Needs"]) head.append(element("th", name));
  const body = table.createTBody();
  for (const [path, calls] of Object.entries(paths)) {
    for (const [method, call] of Object.entries(calls)) {
      const row = body.insertRow();
      row.insertCell().append(element("code", `${method.toUpperCase()} ${path}`));
      const cell = row.insertCell();
      cell.append(call.summary);
      for (const p of call.parameters || []) if (p.in === "query") cell.append(element("small", `${p.name}: ${p.description}`));
      row.insertCell().textContent = call.security ? call.description.replace("Needs: ", "").replace(".", "") : "nothing";
    }
  }
  const scroll = element("div");
  scroll.className = "scroll";
  scroll.tabIndex = 0;
  scroll.append(table);
  document.getElementById("calls").replaceChildren(scroll);
}

load().catch((error) => { document.getElementById("calls").textContent = `The document cannot be loaded: ${error.message}`; });
