addEventListener("fetch", (event) => event.respondWith(serve(event.request)));

async function serve(request) {
  switch (new URL(request.url).pathname) {
    case "/":
      return new Response("hello from JavaScript\n", { headers: { "content-type": "text/plain" } });
    case "/echo":
      return new Response(await request.arrayBuffer());
    case "/stream":
      return new Response(stream(request.body.getReader()));
    default:
      return new Response("nothing here\n", { status: 404 });
  }
}

// A line at once, then the request's body as it comes.
function stream(body) {
  return new ReadableStream({
    start: (to) => to.enqueue(new TextEncoder().encode("first\n")),
    async pull(to) {
      const { done, value } = await body.read();
      if (done) to.close();
      else to.enqueue(value);
    },
  });
}
