/* The two ends of compare.py: clients that ask, and an LLM that takes no time.

     load ask PORT CLIENTS WARM MOST SECONDS RATE [PAUSE] < REQUEST
     load llm

   ask   keeps CLIENTS connections busy with REQUEST, a whole HTTP request in which each
         "########" is replaced by the number of the request. The connections are kept
         alive, unless REQUEST says "Connection: close". The measurement begins when every
         client has received something, but not before WARM and not after MOST seconds,
         and lasts SECONDS. Prints "begun" when it begins, "over" when it ends, then JSON.
         With a PAUSE each waits between its requests, so many seconds on average: else all
         that began together ask together again.
   llm   serves what an OpenAI-compatible server does, and what a FastChat worker does;
         prints its port. The prompt says what to answer: "tokens=8 rate=50" is 8 tokens,
         the first at once, 50 a second; rate=0 is all at once.

   Each token contains one "~" and nothing else does, so tokens can be counted in any
   format. One thread each, epoll, Linux. Loopback only. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define TOKEN "word~ "
#define MOST_PENDING 65536    /* bytes of an answer that were made and not yet sent */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void die(const char *what)
{
    perror(what);
    exit(2);
}

static int poller;

static void watch(int fd, void *who, int how)
{
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = who};
    if (epoll_ctl(poller, how, fd, &e) < 0)
        die("epoll_ctl");
}

/* ---- ask -------------------------------------------------------------------------- */

enum body { UNTIL_CLOSE, LENGTH, CHUNKED };

struct client {
    int fd;
    char head[8192];          /* until the head is whole */
    size_t have;              /* bytes of it; SIZE_MAX once it was read */
    enum body body;
    long left;                /* of the body, or of the chunk; -1: in a chunk's size */
    long size;                /* of the chunk, as far as it was read */
    int last;                 /* in the last chunk's size line, or beyond it */
    int over;                 /* the answer is complete; the server is to close */
    double sent, token_at;    /* when it asked; when it last got tokens */
    double due;               /* when it will ask again, while it pauses */
    int got, closing;         /* tokens of this answer; it will be closed after it */
    int started;              /* it has had something at all */
    long in_window;           /* tokens */
    double worst;             /* gap between tokens in the window */
};

struct list { double *at; size_t n, room; };

static void add(struct list *l, double x)
{
    if (l->n == l->room)
        l->at = realloc(l->at, (l->room = l->room * 2 + 1024) * sizeof x);
    l->at[l->n++] = x;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_list(const char *name, struct list *l)
{
    qsort(l->at, l->n, sizeof *l->at, compare);
    printf(", \"%s\": ", name);
    if (!l->n)
        printf("null");
    else
        printf("{\"p50\": %.7f, \"p99\": %.7f, \"max\": %.7f}", l->at[l->n / 2],
               l->at[(size_t)((l->n - 1) * 0.99 + 0.5)], l->at[l->n - 1]);
}

static int port, started;
static char request[1 << 17], *numbers[8];
static size_t request_bytes;
static int one_each;          /* a connection for each request */
static unsigned long asked, answered, errors;
static char error_text[256];
static double pause_seconds;
static double window = 1e300, window_end = 1e300, counted_from;
static struct list latencies, firsts, worsts;

static void fail(const char *why)
{
    if (!errors++)
        snprintf(error_text, sizeof error_text, "%.200s", why);
}

static void ask(struct client *c)
{
    char digits[16];
    snprintf(digits, sizeof digits, "%08lu", ++asked % 100000000);
    for (char **number = numbers; *number; number++)
        memcpy(*number, digits, 8);
    c->have = 0, c->got = 0, c->last = 0, c->closing = 0, c->over = 0;
    c->sent = now();
    if (send(c->fd, request, request_bytes, MSG_NOSIGNAL) != (ssize_t)request_bytes)
        fail("the request could not be sent");
}

static void connect_client(struct client *c)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
    int yes = 1;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    if (connect(c->fd, (struct sockaddr *)&a, sizeof a) < 0)
        die("connect");
    watch(c->fd, c, EPOLL_CTL_ADD);
    ask(c);
}

static void end_answer(struct client *c, int closed)
{
    double t = now();
    if (t >= window && t < window_end) {
        answered++;
        add(&latencies, t - c->sent);
    }
    if (!c->got)
        fail("an answer without a token");
    if (closed) {
        close(c->fd);
        connect_client(c);
    } else if (c->closing)
        c->over = 1;          /* the server closes first, which keeps our port free */
    else if (pause_seconds)
        c->due = now() + 2 * pause_seconds * drand48();
    else
        ask(c);
}

/* Count the tokens in some bytes of a body. */
static void count(struct client *c, const char *data, size_t n)
{
    const char *end = data + n;
    int tokens = 0;
    while (data < end && (data = memchr(data, '~', end - data)))
        tokens++, data++;
    if (!tokens)
        return;
    double t = now();
    if (!c->started)
        c->started = 1, started++;
    if (!c->got && t >= window && t < window_end)
        add(&firsts, t - c->sent);
    if (t >= window && t < window_end) {
        double since = c->token_at > counted_from ? c->token_at : counted_from;
        if (t - since > c->worst)
            c->worst = t - since;
        c->in_window += tokens;
    }
    c->got += tokens, c->token_at = t;
}

/* Take bytes of the body; whether the answer ended with them. */
static int take_body(struct client *c, const char *data, size_t n)
{
    count(c, data, n);
    if (c->body == UNTIL_CLOSE)
        return 0;
    if (c->body == LENGTH)
        return (c->left -= n) <= 0;
    for (const char *end = data + n; data < end;) {
        if (c->left > 0) {                     /* in a chunk, or in the CRLF after it */
            long step = end - data < c->left ? end - data : c->left;
            data += step, c->left -= step;
            if (!c->left)
                c->left = -1, c->size = 0;
            continue;
        }
        char b = *data++;
        if (c->last) {                         /* wants "\r\n" of the empty trailer */
            if (b == '\n' && ++c->last == 3)
                return 1;
        } else if (b == '\n') {
            if (c->size)
                c->left = c->size + 2;
            else
                c->last = 2;
        } else if (b >= '0' && b <= '9')
            c->size = c->size * 16 + b - '0';
        else if ((b | 32) >= 'a' && (b | 32) <= 'f')
            c->size = c->size * 16 + (b | 32) - 'a' + 10;
    }
    return 0;
}

static const char *field(const char *head, const char *name)
{
    const char *at = strcasestr(head, name);
    return at ? at + strlen(name) : NULL;
}

/* Read the head, when it is whole; whether it is. What follows it is left to take_body. */
static int read_head(struct client *c, const char *data, size_t n, size_t *used)
{
    size_t before = c->have, step = n;
    if (step > sizeof c->head - 1 - c->have)
        step = sizeof c->head - 1 - c->have;
    memcpy(c->head + c->have, data, step);
    c->head[c->have += step] = 0;
    char *end = strstr(c->head, "\r\n\r\n");
    if (!end) {
        *used = n;
        return 0;
    }
    *used = end + 4 - c->head - before;
    if (strncmp(c->head + 9, "200", 3))
        fail(c->head);
    end[2] = 0;
    const char *value;
    if ((value = field(c->head, "\r\ncontent-length:")))
        c->body = LENGTH, c->left = atol(value);
    else if ((value = field(c->head, "\r\ntransfer-encoding: chunked")))
        c->body = CHUNKED, c->left = -1, c->size = 0;
    else
        c->body = UNTIL_CLOSE;
    c->closing = one_each || c->body == UNTIL_CLOSE || field(c->head, "\r\nconnection: close");
    c->have = SIZE_MAX;
    return 1;
}

static void hear(struct client *c)
{
    static char data[1 << 17];
    ssize_t n = recv(c->fd, data, sizeof data, 0);
    size_t used = 0;
    if (c->over) {
        if (n <= 0) {
            close(c->fd);
            connect_client(c);
        }
        return;
    }
    if (n <= 0) {
        if (c->have == SIZE_MAX && c->body == UNTIL_CLOSE && !n)
            return end_answer(c, 1);
        fail(n ? strerror(errno) : "the connection was closed");
        close(c->fd);
        if (errors > 1000)
            return;
        return connect_client(c);
    }
    if (c->have != SIZE_MAX && !read_head(c, data, n, &used))
        return;
    if (take_body(c, data + used, n - used))
        end_answer(c, 0);
}

static int run_clients(char **argv)
{
    int n = atoi(argv[1]), i;
    double warm = atof(argv[2]), most = atof(argv[3]), seconds = atof(argv[4]);
    double rate = atof(argv[5]), begun = now(), all_started = -1;
    pause_seconds = argv[6] ? atof(argv[6]) : 0;
    struct epoll_event events[512];
    struct client *clients = calloc(n, sizeof *clients);
    port = atoi(argv[0]);
    request_bytes = fread(request, 1, sizeof request - 1, stdin);
    char *at = request;
    for (i = 0; i < 7 && (at = strstr(at, "########")); at += 8)
        numbers[i++] = at;
    one_each = !!strstr(request, "\r\nConnection: close\r\n");
    for (i = 0; i < n; i++)
        connect_client(&clients[i]);
    while (errors <= 1000) {
        double t = now();
        if (all_started < 0 && started == n)
            all_started = t - begun;
        if (window > t && ((t - begun >= warm && started == n) || t - begun >= most)) {
            window = counted_from = t, window_end = t + seconds;
            puts("begun");
            fflush(stdout);
        }
        if (t >= window_end) {
            puts("over");
            fflush(stdout);
            break;
        }
        for (i = 0; i < n && pause_seconds; i++)
            if (clients[i].due && clients[i].due <= t)
                clients[i].due = 0, ask(&clients[i]);
        int ready = epoll_wait(poller, events, 512, pause_seconds ? 1 : 5);
        for (i = 0; i < ready; i++)
            hear(events[i].data.ptr);
    }
    long tokens = 0, kept = 0;
    for (i = 0; i < n; i++) {
        struct client *c = &clients[i];
        double since = c->token_at > counted_from ? c->token_at : counted_from;
        if (window_end - since > c->worst)
            c->worst = window_end - since;
        add(&worsts, c->worst);
        tokens += c->in_window;
        kept += c->in_window >= 0.95 * rate * seconds;
    }
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    printf("{\"seconds\": %.3f, \"answers\": %lu, \"asked\": %lu, \"tokens\": %ld, "
           "\"errors\": %lu, \"kept\": %.4f, \"started\": %d, \"all_started\": %.3f, "
           "\"cpu\": %.3f", seconds, answered, asked, tokens, errors, (double)kept / n,
           started, all_started, use.ru_utime.tv_sec + use.ru_stime.tv_sec
           + (use.ru_utime.tv_usec + use.ru_stime.tv_usec) * 1e-6);
    print_list("latency", &latencies);
    print_list("first", &firsts);
    print_list("gap", &worsts);
    for (char *p = error_text; *p; p++)
        if (*p == '"' || *p == '\\' || (unsigned char)*p < 32)
            *p = ' ';
    printf(", \"error\": \"%s\"}\n", error_text);
    return 0;
}

/* ---- llm -------------------------------------------------------------------------- */

#define JSON_HEAD "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
#define NOT_FOUND "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
#define EVENT_HEAD "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" \
    "Transfer-Encoding: chunked\r\n\r\n"
#define CHUNK "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1," \
    "\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{"
#define CHUNK_END "\n\n\r\n"

struct caller {
    int fd;
    char *in, *out;           /* what came, what could not be sent yet */
    size_t have, in_room, pending, sent, out_room;
    int active, worker;       /* index + 1 in the active ones; a FastChat answer */
    int closing;              /* it asked for the connection to be closed after the answer */
    long tokens, done;        /* of the answer under way */
    double rate, began;
};

static struct caller *active[20000];
static int actives;
static char token_chunk[512], last_chunks[1024];
static char words[10000 * sizeof TOKEN];
static size_t token_bytes, last_bytes;

static void put(struct caller *c, const char *data, size_t n)
{
    if (c->pending + n > c->out_room)
        c->out = realloc(c->out, c->out_room = (c->pending + n) * 2);
    memcpy(c->out + c->pending, data, n);
    c->pending += n;
}

static void flush_out(struct caller *c)
{
    if (c->sent == c->pending)
        return;
    ssize_t n = send(c->fd, c->out + c->sent, c->pending - c->sent,
                     MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0)
        c->sent += n;
    if (c->sent == c->pending) {
        c->sent = c->pending = 0;
        if (c->closing && !c->active)
            shutdown(c->fd, SHUT_WR);
    }
}

static void deactivate(struct caller *c)
{
    if (c->active) {
        active[c->active - 1] = active[--actives];
        active[c->active - 1]->active = c->active;
        c->active = 0;
    }
}

static void put_json(struct caller *c, const char *body)
{
    char head[128];
    put(c, head, snprintf(head, sizeof head, JSON_HEAD "%zu\r\n\r\n", strlen(body)));
    put(c, body, strlen(body));
    flush_out(c);
}

/* A whole chat completion. */
static void put_whole(struct caller *c, long tokens)
{
    static char body[sizeof words + 512];
    size_t bytes = tokens * strlen(TOKEN);
    if (bytes > sizeof words)
        bytes = sizeof words;
    sprintf(body, "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1,"
        "\"model\":\"m\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\","
        "\"content\":\"%.*s\"},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":1,"
        "\"completion_tokens\":%ld,\"total_tokens\":%ld}}", (int)bytes, words, tokens,
        tokens + 1);
    put_json(c, body);
}

/* One event of a FastChat worker: the whole text so far, with a zero byte after it. */
static void put_worker_event(struct caller *c)
{
    static char body[sizeof words + 256], head[32];
    size_t bytes = c->done * strlen(TOKEN);
    if (bytes > sizeof words)
        bytes = sizeof words;
    int n = sprintf(body, "{\"text\": \"%.*s\", \"error_code\": 0, \"usage\": "
        "{\"prompt_tokens\": 1, \"completion_tokens\": %ld, \"total_tokens\": 1}, "
        "\"finish_reason\": %s}", (int)bytes, words, c->done,
        c->done == c->tokens ? "\"stop\"" : "null") + 1;     /* the zero byte */
    put(c, head, snprintf(head, sizeof head, "%x\r\n", n));
    put(c, body, n);
    put(c, "\r\n", 2);
}

/* Write the tokens that are due, but no more than a reader that is slow can take. */
static void generate(struct caller *c, double t)
{
    long due = c->rate ? 1 + (long)((t - c->began) * c->rate) : c->tokens;
    if (due > c->tokens)
        due = c->tokens;
    while (c->done < due && c->pending < MOST_PENDING) {
        c->done++;
        if (c->worker)
            put_worker_event(c);
        else
            put(c, token_chunk, token_bytes);
    }
    if (c->done == c->tokens) {
        if (c->worker)
            put(c, "0\r\n\r\n", 5);
        else
            put(c, last_chunks, last_bytes);
        deactivate(c);
    }
    flush_out(c);
}

/* What a slow reader leaves is written before more is made. */
static void step(struct caller *c, double t)
{
    flush_out(c);
    if (!c->pending)
        generate(c, t);
}

static void serve(struct caller *c, const char *path, const char *body)
{
    const char *tokens = strstr(body, "tokens="), *rate = strstr(body, "rate=");
    int worker = !strncmp(path, "/worker_", 8) || !strncmp(path, "/model_", 7)
                 || !strncmp(path, "/count_", 7);
    if (worker && strncmp(path, "/worker_generate", 16))
        return put_json(c, "{\"model_names\": [\"m\"], \"speed\": 1, \"queue_length\": 0,"
            " \"context_length\": 8192, \"count\": 1, \"error_code\": 0, \"conv\": "
            "{\"name\": \"m\", \"system_template\": \"{system_message}\", "
            "\"system_message\": \"\", \"roles\": [\"user\", \"assistant\"], "
            "\"messages\": [], \"offset\": 0, \"sep_style\": 1, \"sep\": \" \", "
            "\"sep2\": null, \"stop_str\": null, \"stop_token_ids\": null}}");
    if (!strncmp(path, "/v1/models", 10))
        return put_json(c, "{\"object\":\"list\",\"data\":[{\"id\":\"m\",\"object\":"
            "\"model\",\"created\":1,\"owned_by\":\"m\"}]}");
    if (!strncmp(path, "/worker_generate ", 17))
        return put_json(c, "{\"text\": \"" TOKEN "\", \"error_code\": 0, \"usage\": "
            "{\"prompt_tokens\": 1, \"completion_tokens\": 1, \"total_tokens\": 2}, "
            "\"finish_reason\": \"stop\"}");
    if (!worker && strncmp(path, "/v1/chat/completions", 20)) {
        put(c, NOT_FOUND, strlen(NOT_FOUND));
        return flush_out(c);
    }
    c->tokens = tokens ? atol(tokens + 7) : 1;
    if (!worker && !strstr(body, "\"stream\":true") && !strstr(body, "\"stream\": true"))
        return put_whole(c, c->tokens);
    c->rate = rate ? atof(rate + 5) : 0;
    c->done = 0, c->began = now(), c->worker = worker;
    active[actives++] = c, c->active = actives;
    put(c, EVENT_HEAD, strlen(EVENT_HEAD));
    generate(c, c->began);
}

static void close_caller(struct caller *c)
{
    deactivate(c);
    close(c->fd);
    free(c->in), free(c->out), free(c);
}

static void hear_caller(struct caller *c)
{
    if (c->have + 65536 > c->in_room)
        c->in = realloc(c->in, c->in_room = c->have + 131072);
    ssize_t n = recv(c->fd, c->in + c->have, 65535, 0);
    if (n <= 0)
        return close_caller(c);
    c->have += n;
    c->in[c->have] = 0;
    char *end = strstr(c->in, "\r\n\r\n"), *path = strchr(c->in, ' ');
    if (!end || !path)
        return;
    end[2] = 0;
    const char *length = field(c->in, "\r\ncontent-length:");
    int chunked = !!field(c->in, "\r\ntransfer-encoding: chunked");
    c->closing = !!field(c->in, "\r\nconnection: close");
    size_t whole = end + 4 - c->in + (length ? atol(length) : 0);
    end[2] = '\r';
    if (c->have < whole || (chunked && !strstr(end + 4, "\r\n0\r\n\r\n")))
        return;
    c->have = 0;                          /* none of the peers pipelines */
    serve(c, path + 1, end + 4);
}

static void run_llm(void)
{
    struct sockaddr_in a = {.sin_family = AF_INET};
    socklen_t length = sizeof a;
    struct epoll_event events[512];
    int server = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(server, (struct sockaddr *)&a, sizeof a) < 0 || listen(server, 4096) < 0)
        die("listen");
    getsockname(server, (struct sockaddr *)&a, &length);
    printf("%d\n", ntohs(a.sin_port));
    fflush(stdout);
    static const char token[] = "data: " CHUNK "\"content\":\"" TOKEN "\"},"
        "\"finish_reason\":null}]}" "\n\n";
    static const char last[] = "data: " CHUNK "},\"finish_reason\":\"stop\"}]}\n\n"
        "data: [DONE]\n\n";
    token_bytes = sprintf(token_chunk, "%zx\r\n%s\r\n", sizeof token - 1, token);
    last_bytes = sprintf(last_chunks, "%zx\r\n%s\r\n0\r\n\r\n", sizeof last - 1, last);
    for (size_t i = 0; i + strlen(TOKEN) < sizeof words; i += strlen(TOKEN))
        memcpy(words + i, TOKEN, strlen(TOKEN));
    watch(server, NULL, EPOLL_CTL_ADD);
    for (double stepped = 0;;) {
        int ready = epoll_wait(poller, events, 512, actives ? 1 : -1);
        for (int i = 0; i < ready; i++) {
            struct caller *c = events[i].data.ptr;
            if (c) {
                hear_caller(c);
                continue;
            }
            c = calloc(1, sizeof *c);
            c->fd = accept(server, NULL, NULL);
            setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
            watch(c->fd, c, EPOLL_CTL_ADD);
        }
        double t = now();
        if (t - stepped >= 0.0009) {
            for (int i = actives; i-- > 0;)
                step(active[i], t);
            stepped = t;
        }
    }
}

int main(int argc, char **argv)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    poller = epoll_create1(0);
    if ((argc == 8 || argc == 9) && !strcmp(argv[1], "ask"))
        return run_clients(argv + 2);
    if (argc == 2 && !strcmp(argv[1], "llm"))
        run_llm();
    fprintf(stderr, "usage: load ask PORT CLIENTS WARM MOST SECONDS RATE [PAUSE] < REQUEST\n"
            "       load llm\n");
    return 2;
}
