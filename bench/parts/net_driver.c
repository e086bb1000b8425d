/* The guest's half of a network benchmark, and the host's: one thread that drives the virtqueues of a device in
 * another process by shared memory, and sends to, or hears from, the TAP behind that device.
 *
 *   net_driver MODE MEMORY_FD RX_KICK_FD TX_KICK_FD KICK_TEXT INTERFACE LENGTH GSO SECONDS
 *
 * MODE is tx (guest to host), rx (host to guest), rr (there and back, one at a time), or plain-tx and plain-rx,
 * which do the same with bare readv and writev on the TAP whose descriptor is MEMORY_FD.
 * A kick is an eventfd's where KICK_TEXT is "-"; else that text with the queue's number goes to RX_KICK_FD, the
 * socket of QEMU's qtest protocol. Rings lie at fixed places, see RINGS here and in bench/net.py. GSO is the size
 * of a segment, 0 for none: then packets are TCP over IPv4 and carry no sum.
 *
 * After a warm-up it prints "go", in the end the packets and the seconds between.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { SIZE = 256, RINGS = 0x10000, TABLES = 0x100000, DATA = 0x400000, HEADER = 12, PAGE = 4096 };
enum { F_NEXT = 1, F_WRITE = 2, F_INDIRECT = 4, BATCH = 32, OUTSTANDING = 512 };
static const double WARM_UP = 0.3;

struct descriptor { uint64_t gpa; uint32_t length; uint16_t flags, next; };
struct element { uint32_t head, length; };
struct header { uint8_t flags, gso_type; uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers; };

struct ring {
    struct descriptor *table;
    volatile uint16_t *avail, *used;
    uint16_t next_avail, next_used, kicked;
    int number, kick_fd;
};

static uint8_t *memory;
static const char *kick_text;
static int qtest = -1;

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void ring_init(struct ring *ring, int number, int kick_fd)
{
    uint8_t *at = memory + RINGS * (1 + number);
    ring->table = (void *)at;
    ring->avail = (void *)(at + 0x2000);
    ring->used = (void *)(at + 0x4000);
    ring->next_avail = ring->next_used = ring->kicked = 0;
    ring->number = number;
    ring->kick_fd = kick_fd;
    ring->avail[2 + SIZE] = (uint16_t)-2; /* used_event: no interrupts, the used ring is polled */
}

static void ring_kick(struct ring *ring)
{
    static char answers[65536];
    char text[128];
    uint64_t one = 1;
    if (qtest < 0) {
        if (write(ring->kick_fd, &one, 8) != 8)
            fail("kick");
        return;
    }
    int length = snprintf(text, sizeof text, "%s %#x\n", kick_text, ring->number);
    if (write(qtest, text, length) != length)
        fail("kick by qtest");
    while (recv(qtest, answers, sizeof answers, MSG_DONTWAIT) > 0)
        ;
}

/* Show the device what was added; kick it if it wants that. */
static void ring_publish(struct ring *ring)
{
    if (ring->avail[1] == ring->next_avail)
        return;
    uint16_t before = ring->kicked;
    __atomic_store_n(&ring->avail[1], ring->next_avail, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    uint16_t event = ring->used[2 + 4 * SIZE]; /* avail_event */
    ring->kicked = ring->next_avail;
    if ((uint16_t)(ring->next_avail - event - 1) < (uint16_t)(ring->next_avail - before))
        ring_kick(ring);
}

static void ring_add(struct ring *ring, uint16_t head)
{
    ring->avail[2 + ring->next_avail++ % SIZE] = head;
}

static struct element *ring_take(struct ring *ring)
{
    uint16_t index = __atomic_load_n(&ring->used[1], __ATOMIC_ACQUIRE);
    if (index == ring->next_used)
        return NULL;
    return (struct element *)&ring->used[2] + ring->next_used++ % SIZE;
}

/* A frame that the host's stack drops early: it is for somebody else's MAC address. */
static void make_packet(uint8_t *place, uint32_t length, uint32_t gso, int to_guest)
{
    struct header *header = (void *)place;
    uint8_t *frame = place + HEADER;
    memset(place, 0, HEADER + length);
    memcpy(frame, to_guest ? "\x2e\0\0\0\0\1" "\2\0\0\0\0\1" : "\2\0\0\0\0\x99" "\x2e\0\0\0\0\1", 12);
    frame[12] = 0x88, frame[13] = 0xb5;
    if (!gso)
        return;
    *header = (struct header){1, 1, 54, gso, 34, 16, 0};
    frame[12] = 0x08, frame[13] = 0x00;
    uint16_t total = htons(length - 14);
    memcpy(frame + 14, "\x45\0\0\0\0\1\0\0\x40\6\0\0\x0a\0\0\2\x0a\0\0\1", 20);
    memcpy(frame + 16, &total, 2);
    memcpy(frame + 34, "\0\7\0\7\0\0\0\1\0\0\0\1\x50\x10\x20\0\0\0\0\0", 20);
}

/* Packet `index` of those to send: one descriptor, or an indirect table as Linux makes it of page fragments. */
static void prepare_tx(struct ring *ring, int index, uint32_t length, uint32_t gso)
{
    uint64_t stride = (HEADER + length + PAGE - 1) / PAGE * PAGE, gpa = DATA + index * stride;
    make_packet(memory + gpa, length, gso, 0);
    if (HEADER + length <= PAGE) {
        ring->table[index] = (struct descriptor){gpa, HEADER + length, 0, 0};
        return;
    }
    uint64_t table = TABLES + index * 0x400;
    struct descriptor *entry = (void *)(memory + table);
    uint32_t left = HEADER + length, count = 0;
    for (; left; count++) {
        uint32_t here = left < PAGE ? left : PAGE;
        left -= here;
        entry[count] = (struct descriptor){gpa + (uint64_t)count * PAGE, here, left ? F_NEXT : 0, count + 1};
    }
    ring->table[index] = (struct descriptor){table, count * 16, F_INDIRECT, 0};
}

static int packet_socket(const char *interface, int vnet_header)
{
    int one = 1, fd = socket(AF_PACKET, SOCK_RAW | SOCK_NONBLOCK, 0);
    struct sockaddr_ll place = {.sll_family = AF_PACKET, .sll_ifindex = if_nametoindex(interface)};
    if (fd < 0 || bind(fd, (void *)&place, sizeof place) < 0)
        fail("packet socket");
    int room = 64 << 20;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room);
    setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof one);
    if (vnet_header && setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof one) < 0)
        fail("PACKET_VNET_HDR");
    return fd;
}

static double began, ends;
static uint64_t done_before;
static uint32_t look_every = 32; /* turns between looks at the clock */

/* True until the time is over; `done` packets so far. */
static int going(uint64_t done, double seconds)
{
    static uint32_t calls;
    if (++calls % look_every)
        return 1;
    double time = now();
    if (!began)
        began = time;
    if (!ends && time - began >= WARM_UP) {
        ends = time + seconds;
        began = time;
        done_before = done;
        printf("go\n");
        fflush(stdout);
    }
    return !ends || time < ends;
}

static void report(uint64_t done)
{
    printf("%llu %.6f\n", (unsigned long long)(done - done_before), now() - began);
}

static void run_tx(int kick_fd, uint32_t length, uint32_t gso, double seconds)
{
    struct ring ring;
    struct element *used;
    uint64_t done = 0;
    ring_init(&ring, 1, kick_fd);
    for (int index = 0; index < SIZE; index++) {
        prepare_tx(&ring, index, length, gso);
        ring_add(&ring, index);
    }
    ring_publish(&ring);
    while (going(done, seconds)) {
        int count = 0;
        while (count < BATCH && (used = ring_take(&ring))) {
            ring_add(&ring, used->head);
            count++;
        }
        done += count;
        ring_publish(&ring);
        __builtin_ia32_pause();
    }
    report(done);
}

static void fill_rx(struct ring *ring, uint32_t room)
{
    for (int index = 0; index < SIZE; index++) {
        ring->table[index] = (struct descriptor){DATA + (uint64_t)index * PAGE, room, F_WRITE, 0};
        ring_add(ring, index);
    }
    ring_publish(ring);
}

/* Take received chains back; returns the packets among them. As Linux does, they are offered anew 32 at a time. */
static int recycle(struct ring *ring, int *left)
{
    static uint16_t taken[SIZE];
    static int count;
    struct element *used;
    int packets = 0;
    while ((used = ring_take(ring))) {
        if (*left == 0) {
            *left = ((struct header *)(memory + DATA + used->head * PAGE))->num_buffers;
            packets++;
        }
        --*left;
        taken[count++] = used->head;
    }
    if (count > BATCH) {
        while (count)
            ring_add(ring, taken[--count]);
        ring_publish(ring);
    }
    return packets;
}

/* Send up to a batch, as far as the TAP's queue is sure to have room. */
static uint64_t send_batch(int fd, uint8_t *packet, uint32_t size, uint64_t outstanding, uint64_t most)
{
    static struct mmsghdr messages[BATCH];
    struct iovec vector = {packet, size};
    uint64_t count = outstanding < most ? most - outstanding : 0;
    if (count > BATCH)
        count = BATCH;
    for (uint64_t index = 0; index < count; index++) {
        messages[index].msg_hdr.msg_iov = &vector;
        messages[index].msg_hdr.msg_iovlen = 1;
    }
    int sent = count ? sendmmsg(fd, messages, count, 0) : 0;
    return sent > 0 ? sent : 0;
}

static void run_rx(int kick_fd, const char *interface, uint32_t length, uint32_t gso, double seconds)
{
    static uint8_t packet[1 << 17];
    struct ring ring;
    uint64_t sent = 0, done = 0;
    int left = 0, fd = packet_socket(interface, 1);
    make_packet(packet + 2, length, gso, 1); /* the socket's header has 10 bytes: see below */
    memmove(packet + 4, packet + 2, 10);
    ring_init(&ring, 0, kick_fd);
    fill_rx(&ring, gso ? PAGE : 1536);
    while (going(done, seconds)) {
        sent += send_batch(fd, packet + 4, 10 + length, sent - done, gso ? 64 : OUTSTANDING);
        done += recycle(&ring, &left);
    }
    report(done);
}

static void run_rr(int rx_kick, int tx_kick, const char *interface, uint32_t length, double seconds)
{
    static uint8_t packet[1 << 17], answer[1 << 17];
    struct ring rx, tx;
    uint64_t done = 0;
    int left = 0, fd = packet_socket(interface, 0), listener;
    struct sockaddr_ll place = {.sll_family = AF_PACKET, .sll_protocol = htons(0x88b5),
                                .sll_ifindex = if_nametoindex(interface)};
    listener = socket(AF_PACKET, SOCK_RAW | SOCK_NONBLOCK, 0);
    if (listener < 0 || bind(listener, (void *)&place, sizeof place) < 0)
        fail("listener");
    make_packet(packet, length, 0, 1);
    ring_init(&rx, 0, rx_kick);
    ring_init(&tx, 1, tx_kick);
    fill_rx(&rx, 1536);
    for (int index = 0; index < SIZE; index++)
        prepare_tx(&tx, index, length, 0);
    double limit = now() + 60;
    look_every = 1;
    while (going(done, seconds)) {
        if (send(fd, packet + HEADER, length, 0) < 0)
            fail("send");
        while (!recycle(&rx, &left))
            if (now() > limit)
                exit(1);
        ring_add(&tx, done % SIZE);
        ring_publish(&tx);
        while (recv(listener, answer, sizeof answer, 0) < 0)
            if (now() > limit)
                exit(1);
        while (!ring_take(&tx))
            ;
        done++;
    }
    report(done);
}

static void run_plain_tx(int tap, uint32_t length, uint32_t gso, double seconds)
{
    uint64_t done = 0, stride = (HEADER + length + PAGE - 1) / PAGE * PAGE;
    uint8_t *packets = aligned_alloc(PAGE, SIZE * stride); /* as many as a ring has: the caches are to feel it */
    for (int index = 0; index < SIZE; index++)
        make_packet(packets + index * stride, length, gso, 0);
    while (going(done, seconds))
        done += write(tap, packets + done % SIZE * stride, HEADER + length) > 0;
    report(done);
}

/* The sender is this process; who reads is the benchmark's other child. */
static void run_plain_rx_sender(int counter, const char *interface, uint32_t length, uint32_t gso, double seconds)
{
    static uint8_t packet[1 << 17];
    volatile uint64_t *done = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, counter, 0);
    uint64_t sent = 0;
    int fd = packet_socket(interface, 1);
    if (done == MAP_FAILED)
        fail("mmap");
    make_packet(packet + 2, length, gso, 1);
    memmove(packet + 4, packet + 2, 10);
    while (going(*done, seconds))
        sent += send_batch(fd, packet + 4, 10 + length, sent - *done, gso ? 64 : OUTSTANDING);
    report(*done);
}

static void run_plain_rx_reader(int tap, int counter, uint32_t length)
{
    static uint8_t packets[(SIZE + 32) * PAGE]; /* spread as the driver's buffers are */
    uint64_t stride = (HEADER + length + PAGE - 1) / PAGE, read_so_far = 0;
    volatile uint64_t *done = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, counter, 0);
    if (done == MAP_FAILED)
        fail("mmap");
    while (read(tap, packets + read_so_far++ * stride % SIZE * PAGE, 32 * PAGE) > 0)
        ++*done;
}

int main(int count, char **words)
{
    if (count != 10)
        return 2;
    const char *mode = words[1], *interface = words[6];
    int fd = atoi(words[2]), rx_kick = atoi(words[3]), tx_kick = atoi(words[4]);
    uint32_t length = atoi(words[7]), gso = atoi(words[8]);
    double seconds = atof(words[9]);
    struct stat about;
    kick_text = words[5];
    if (strcmp(kick_text, "-"))
        qtest = rx_kick;
    if (!strcmp(mode, "plain-tx")) {
        run_plain_tx(fd, length, gso, seconds);
        return 0;
    }
    if (!strcmp(mode, "plain-rx")) {
        run_plain_rx_sender(fd, interface, length, gso, seconds);
        return 0;
    }
    if (!strcmp(mode, "plain-reader")) {
        run_plain_rx_reader(fd, rx_kick, length);
        return 0;
    }
    if (fstat(fd, &about) < 0)
        fail("memory");
    memory = mmap(NULL, about.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        fail("memory");
    if (!strcmp(mode, "tx"))
        run_tx(tx_kick, length, gso, seconds);
    else if (!strcmp(mode, "rx"))
        run_rx(rx_kick, interface, length, gso, seconds);
    else if (!strcmp(mode, "rr"))
        run_rr(rx_kick, tx_kick, interface, length, seconds);
    else
        return 2;
    return 0;
}
