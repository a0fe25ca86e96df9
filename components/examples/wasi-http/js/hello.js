addEventListener("fetch", (event) => event.respondWith(serve(event.request)));

async function serve(request) {
  switch (new URL(request.url).pathname) {
    case "/":
      return new Response("hello from JavaScript\n", { headers: { "content-type": "text/plain" } });
    case "/echo":
      return new Response(await request.arrayBuffer());
    default:
      return new Response("nothing here\n", { status: 404 });
  }
}
