/*
 * traffic.c - both ends of a measurement of TCP between a guest and its host.
 *
 *   traffic serve PORT                    on the host; prints a line for each connection
 *   traffic send ADDRESS PORT BYTES       the guest sends
 *   traffic receive ADDRESS PORT BYTES    the guest receives
 *   traffic turns ADDRESS PORT COUNT      a byte there and back, COUNT times
 *
 * The client's first 16 bytes say what is to be done. Times are taken by the server, because a guest's clock is part of what is being
 * compared: from the first byte of the work to the last.
 */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static char buffer[256 << 10];

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static void put(int fd, long long count)
{
	while (count > 0) {
		size_t most = count < (long long)sizeof buffer ? (size_t)count : sizeof buffer;
		ssize_t n = write(fd, buffer, most);
		if (n <= 0)
			die("write");
		count -= n;
	}
}

static void take(int fd, long long count)
{
	while (count > 0) {
		size_t most = count < (long long)sizeof buffer ? (size_t)count : sizeof buffer;
		ssize_t n = read(fd, buffer, most);
		if (n <= 0)
			die("read");
		count -= n;
	}
}

static void serve(int port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
	int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8))
		die("listen");
	for (;;) {
		int fd = accept(listener, NULL, NULL);
		char head[17] = "";
		if (fd < 0)
			die("accept");
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
		take(fd, 16);
		memcpy(head, buffer, 16);
		long long count = atoll(head + 1);
		double start = now();
		if (head[0] == 's') {
			take(fd, count);
			put(fd, 1);
		} else if (head[0] == 'r') {
			put(fd, count);
			take(fd, 1);
		} else {
			for (long long i = 0; i < count; i++) {
				take(fd, 1);
				put(fd, 1);
			}
		}
		double seconds = now() - start;
		if (head[0] == 't')
			printf("turns %.0f /s\n", count / seconds);
		else
			printf("%s %.1f MB/s\n", head[0] == 's' ? "send" : "receive", count / seconds / 1e6);
		fflush(stdout);
		close(fd);
	}
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "serve"))
		serve(atoi(argv[2]));
	if (argc != 5)
		return 2;
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[3]))};
	int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
	char head[32] = "";
	long long count = atoll(argv[4]);
	inet_pton(AF_INET, argv[2], &address.sin_addr);
	if (connect(fd, (struct sockaddr *)&address, sizeof address))
		die("connect");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	snprintf(head, sizeof head, "%c%lld", argv[1][0], count);
	memcpy(buffer, head, 16);
	put(fd, 16);
	if (argv[1][0] == 's') {
		put(fd, count);
		take(fd, 1);
	} else if (argv[1][0] == 'r') {
		take(fd, count);
		put(fd, 1);
	} else {
		for (long long i = 0; i < count; i++) {
			put(fd, 1);
			take(fd, 1);
		}
	}
	return 0;
}
