// Sorts the table by a column, and shows the figures of the chosen metric and cost.
"use strict";
const table = document.querySelector("table");
const said = document.querySelector(".said");

function sort(head) {
  const column = [...head.parentNode.children].indexOf(head);
  const first = head.dataset.first;
  const order = head.getAttribute("aria-sort") === first ? (first === "descending" ? "ascending" : "descending") : first;
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const key = (row) => row.children[column].dataset.value;
  const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  const rows = [...table.tBodies[0].rows].sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === "" || b === "") return (a === "") - (b === ""); // what has no figure is last either way
    return order === "ascending" ? compare(a, b) : compare(b, a);
  });
  table.tBodies[0].append(...rows);
  said.textContent = `sorted by ${head.textContent.trim()}, ${order}`;
}

function choose() {
  const metric = document.getElementById("metric").value;
  const cost = document.getElementById("cost").value;
  for (const one of document.querySelectorAll("[data-metric]")) {
    one.hidden = one.dataset.metric !== metric || (one.dataset.cost || cost) !== cost;
  }
}

for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => sort(button.closest("th")));
}
for (const select of document.querySelectorAll("select")) select.addEventListener("change", choose);
choose(); // a browser may remember another choice
