//! The socket under a driver's connection.
//!
//! The drivers do not expose the file descriptor. On Linux the socket is the one that is new after a connect and whose
//! peer is the server. If several sockets qualify, the client port that the server reports decides. Otherwise the
//! socket counts as unknown and is never touched.

#[cfg(not(target_os = "linux"))]
use crate::url::Target;

/// An open socket of this process. The inode number distinguishes it from a later socket with the same descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Socket {
    descriptor: i32,
    inode: u64,
}

#[cfg(test)]
impl Socket {
    /// A socket that does not exist.
    pub(super) fn none() -> Self {
        Self { descriptor: -1, inode: 0 }
    }
}

/// The wait for the server to close its end of a connection that this process closes.
#[derive(Debug)]
pub(super) struct ServerClose(Socket);

/// The search for the socket that a connect opens.
#[derive(Debug)]
pub(super) struct SocketSearch {
    /// The inode numbers of the sockets before the connect. A duplicated descriptor has the inode number of its socket.
    #[cfg(target_os = "linux")]
    before: std::collections::BTreeSet<u64>,
    /// A lock around connects to a local socket, so that only one socket is new after each of them.
    _local_connect: Option<parking_lot::MutexGuard<'static, ()>>,
}

#[cfg(target_os = "linux")]
mod linux {
    use std::collections::BTreeSet;
    use std::fs;
    use std::sync::{Mutex, PoisonError};
    use std::time::{Duration, Instant};

    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::sys::socket::{
        AddressFamily, MsgFlags, Shutdown, SockaddrLike, SockaddrStorage, getpeername, getsockname, recv, shutdown,
    };
    use nix::unistd::{close, dup};

    use super::super::call_deadline::CallDeadline;
    use super::{ServerClose, Socket, SocketSearch};
    use crate::process::PerProcess;
    use crate::url::{Peer, Target};

    /// The sockets that are known to belong to connections of this process.
    static KNOWN: PerProcess<Mutex<BTreeSet<Socket>>> = PerProcess::new();

    static LOCAL_CONNECT: PerProcess<parking_lot::Mutex<()>> = PerProcess::new();

    /// The time that a connect to a local socket waits for the lock. Without the lock, the search may find nothing.
    const LOCAL_CONNECT_WAIT: Duration = Duration::from_millis(100);

    // Only `server_close` duplicates the descriptor. Elsewhere a SQLite file may have got the descriptor in the meantime,
    // and closing the duplicate would release the locks of this process on that file.
    impl Socket {
        fn is_open(self) -> bool {
            inode(&self.descriptor.to_string()) == Some(self.inode)
        }

        /// The result of `ask` for the descriptor, if the descriptor still belongs to this socket.
        fn ask<T>(self, ask: impl FnOnce(i32) -> nix::Result<T>) -> Option<T> {
            let answer = ask(self.descriptor).ok()?;
            self.is_open().then_some(answer)
        }

        /// Shuts both directions down, which wakes a driver that waits for the server. Returns `false` if the socket
        /// is already closed.
        pub(crate) fn cut(self) -> bool {
            self.is_open() && shutdown(self.descriptor, Shutdown::Both).is_ok()
        }

        /// Prepares the wait for the server's end of a connection that is about to be closed. `None` if the socket is
        /// not open.
        pub(in super::super) fn server_close(self) -> Option<ServerClose> {
            let mut known = KNOWN.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
            if !self.is_open() {
                return None;
            }
            // The calling thread owns the open connection, so the descriptor cannot belong to a SQLite file.
            let twin = Self { descriptor: dup(self.descriptor).ok()?, ..self };
            known.insert(twin);
            Some(ServerClose(twin))
        }

        /// Has to be called before the connection is closed.
        pub(in super::super) fn forget(self) {
            if let Some(known) = KNOWN.get() {
                known.lock().unwrap_or_else(PoisonError::into_inner).remove(&self);
            }
        }

        /// Whether the peer of the socket may be `peer`.
        fn leads_to(self, peer: &Peer) -> bool {
            let Some(address) = self.ask(getpeername::<SockaddrStorage>) else { return false };
            match address.family() {
                Some(AddressFamily::Unix) => {
                    let path = address.as_unix_addr().and_then(|address| address.path());
                    path.is_some_and(|path| peer.may_have_path(path))
                }
                Some(AddressFamily::Inet | AddressFamily::Inet6) => {
                    port(&address).is_some_and(|port| peer.may_have_port(port))
                }
                _ => false,
            }
        }

        fn own_port(self) -> Option<u16> {
            port(&self.ask(getsockname::<SockaddrStorage>)?)
        }
    }

    impl ServerClose {
        /// Waits until the server closes its end, which it does after it has freed the session's slot.
        pub(in super::super) fn wait(&self, end: Instant) {
            let Self(twin) = self;
            // libpq's sockets do not block. The driver does not use this socket any more.
            if let Ok(flags) = fcntl(twin.descriptor, FcntlArg::F_GETFL) {
                let blocking = OFlag::from_bits_truncate(flags) - OFlag::O_NONBLOCK;
                let _ = fcntl(twin.descriptor, FcntlArg::F_SETFL(blocking));
            }
            let _ = shutdown(twin.descriptor, Shutdown::Write);
            let _call_deadline = CallDeadline::begin(*twin, end);
            let mut rest = [0; 512];
            while recv(twin.descriptor, &mut rest, MsgFlags::empty()).is_ok_and(|received| received > 0) {}
        }
    }

    impl Drop for ServerClose {
        fn drop(&mut self) {
            self.0.forget();
            let _ = close(self.0.descriptor);
        }
    }

    impl SocketSearch {
        pub(in super::super) fn begin(target: &Target) -> Self {
            let local_connect =
                || LOCAL_CONNECT.get_or_init(parking_lot::Mutex::default).try_lock_for(LOCAL_CONNECT_WAIT);
            let local_connect = if target.is_local() { local_connect() } else { None };
            let before = sockets().into_iter().map(|socket| socket.inode).collect();
            Self { before, _local_connect: local_connect }
        }

        /// `own_port` asks the server for the client's port on the new connection.
        pub(in super::super) fn end(self, target: &Target, own_port: impl FnOnce() -> Option<u16>) -> Option<Socket> {
            let peer = target.peer();
            let mut new = sockets();
            new.retain(|socket| !self.before.contains(&socket.inode) && socket.leads_to(&peer));
            let mut known = KNOWN.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
            new.retain(|socket| known.iter().all(|other| other.inode != socket.inode));
            if new.len() > 1 {
                drop(known);
                let port = own_port();
                new.retain(|socket| port.is_some() && socket.own_port() == port);
                known = KNOWN.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
            }
            let [socket] = new[..] else { return None };
            known.insert(socket);
            Some(socket)
        }
    }

    fn port(address: &SockaddrStorage) -> Option<u16> {
        let v4 = address.as_sockaddr_in().map(|address| address.port());
        v4.or_else(|| address.as_sockaddr_in6().map(|address| address.port()))
    }

    /// The open sockets of this process.
    fn sockets() -> Vec<Socket> {
        let Ok(entries) = fs::read_dir("/proc/self/fd") else { return Vec::new() };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let socket = |name: String| Some(Socket { descriptor: name.parse().ok()?, inode: inode(&name)? });
        names.filter_map(socket).collect()
    }

    /// The inode number of a descriptor, if the descriptor is a socket.
    fn inode(descriptor: &str) -> Option<u64> {
        let link = fs::read_link(format!("/proc/self/fd/{descriptor}")).ok()?;
        link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    }

    #[cfg(test)]
    mod tests {
        use std::io::Read;
        use std::net::{TcpListener, TcpStream};
        use std::os::fd::AsRawFd;
        use std::os::unix::net::UnixListener;
        use std::os::unix::net::UnixStream;

        use super::*;

        fn socket_of(stream: &impl AsRawFd) -> Socket {
            let descriptor = stream.as_raw_fd();
            Socket { descriptor, inode: inode(&descriptor.to_string()).expect("a socket") }
        }

        #[test]
        fn cut_wakes_a_reader_and_spares_a_later_socket_with_the_same_descriptor() {
            let (mut mine, _other) = UnixStream::pair().expect("a pair");
            let socket = socket_of(&mine);
            let reader = std::thread::spawn(move || (mine.read(&mut [0]).expect("an end"), mine));
            assert!(socket.cut());
            let (read, mine) = reader.join().expect("no panic");
            assert_eq!(read, 0);
            drop(mine);
            let later = Socket { inode: socket.inode + 1_000_000, ..socket };
            assert!(!later.cut(), "another inode");
        }

        #[test]
        fn ending_waits_until_the_other_side_closes() {
            let (mine, other) = UnixStream::pair().expect("a pair");
            mine.set_nonblocking(true).expect("a socket");
            let server_close = socket_of(&mine).server_close().expect("open");
            drop(mine);
            let closer = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(100));
                drop(other);
            });
            let started = Instant::now();
            server_close.wait(started + Duration::from_secs(10));
            assert!((100..5000).contains(&started.elapsed().as_millis()), "{:?}", started.elapsed());
            closer.join().expect("no panic");
        }

        #[test]
        fn search_finds_the_socket_of_a_connect_beside_others() {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let port = listener.local_addr().expect("bound").port();
            let other = TcpListener::bind("127.0.0.1:0").expect("a port");
            let target = Target::parse(&format!("postgres://app@127.0.0.1:{port}/shop"), None).expect("valid");
            let earlier = TcpStream::connect(("127.0.0.1", port)).expect("listens");
            let search = SocketSearch::begin(&target);
            let elsewhere = TcpStream::connect(other.local_addr().expect("bound")).expect("listens");
            let mine = TcpStream::connect(("127.0.0.1", port)).expect("listens");
            let accepted = listener.accept().expect("one came");
            let found = search.end(&target, || None).expect("found");
            assert_eq!(found, socket_of(&mine));
            found.forget();
            drop((earlier, elsewhere, accepted));
        }

        #[test]
        fn search_asks_the_server_if_two_sockets_qualify_and_does_not_guess() {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let port = listener.local_addr().expect("bound").port();
            let target = Target::parse(&format!("mysql://app@127.0.0.1:{port}/shop"), None).expect("valid");
            let both = |own: fn(&TcpStream) -> Option<u16>| {
                let search = SocketSearch::begin(&target);
                let [mine, other] = [0; 2].map(|_| TcpStream::connect(("127.0.0.1", port)).expect("listens"));
                let found = search.end(&target, || own(&mine));
                found.iter().for_each(|socket| socket.forget());
                assert!(found.is_none_or(|socket| socket == socket_of(&mine)));
                drop(other);
                found.is_some()
            };
            assert!(both(|mine| Some(mine.local_addr().expect("connected").port())));
            assert!(!both(|_| None));
            assert!(!both(|_| Some(1)));
        }

        #[test]
        fn search_finds_a_local_socket_by_its_path() {
            let folder = std::env::temp_dir().join(format!("diesel-session-socket-{}", std::process::id()));
            fs::create_dir_all(&folder).expect("a folder");
            let listener = UnixListener::bind(folder.join(".s.PGSQL.5432")).expect("a socket");
            let other = UnixListener::bind(folder.join("other")).expect("a socket");
            let url = format!("postgres:///shop?host={}", folder.display());
            let target = Target::parse(&url, None).expect("valid");
            assert!(target.is_local());
            let search = SocketSearch::begin(&target);
            let mine = UnixStream::connect(folder.join(".s.PGSQL.5432")).expect("listens");
            let elsewhere = UnixStream::connect(folder.join("other")).expect("listens");
            let found = search.end(&target, || None);
            fs::remove_dir_all(&folder).expect("its own");
            assert_eq!(found, Some(socket_of(&mine)));
            found.iter().for_each(|socket| socket.forget());
            drop((listener, other, elsewhere));
        }
    }
}

#[cfg(not(target_os = "linux"))]
impl Socket {
    pub(crate) fn cut(self) -> bool {
        false
    }

    pub(super) fn forget(self) {}

    pub(super) fn server_close(self) -> Option<ServerClose> {
        None
    }
}

#[cfg(not(target_os = "linux"))]
impl ServerClose {
    pub(super) fn wait(&self, _: std::time::Instant) {}
}

#[cfg(not(target_os = "linux"))]
impl SocketSearch {
    pub(super) fn begin(_: &Target) -> Self {
        Self { _local_connect: None }
    }

    pub(super) fn end(self, _: &Target, _: impl FnOnce() -> Option<u16>) -> Option<Socket> {
        None
    }
}
