addEventListener("fetch", (event) => event.respondWith(answer(event.request)));

async function answer(request) {
  const headers = { "content-type": "text/plain" };
  if (new URL(request.url).pathname === "/") return new Response("hello from {{name}}\n", { headers });
  return new Response("nothing here\n", { status: 404, headers });
}
