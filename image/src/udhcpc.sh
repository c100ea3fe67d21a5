#!/bin/sh
# What udhcpc has learnt (its arguments are in its README.udhcpc) becomes the
# interface's address, the way out and the name servers.
case $1 in
deconfig)
	ifconfig "$interface" 0.0.0.0 up
	;;
bound | renew)
	ifconfig "$interface" "$ip" netmask "${subnet:-255.255.255.0}"
	for gateway in $router; do
		route add default gw "$gateway" dev "$interface"
	done
	for server in $dns; do
		echo "nameserver $server"
	done >/etc/resolv.conf
	;;
esac
