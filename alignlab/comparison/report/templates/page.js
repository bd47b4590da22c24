// A table that is cut at the right says so.
const tables = [...document.querySelectorAll(".scroll")];
const mark = () => tables.forEach((t) => t.classList.toggle("wide", t.scrollLeft + t.clientWidth < t.scrollWidth - 2));
tables.forEach((table) => table.addEventListener("scroll", mark, { passive: true }));
addEventListener("resize", mark);
mark();
