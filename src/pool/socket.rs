//! The socket under a driver's connection.
//!
//! The drivers do not expose the file descriptor. On Linux the socket is the one that is new after a connect and whose
//! peer is the server. If several sockets qualify, the client port that the server reports decides. If several local
//! sockets qualify, which have no port, the connect is repeated. Otherwise the socket counts as unknown and is never
//! touched.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockaddrLike, SockaddrStorage, getpeername, getsockname, recv, shutdown,
};
use nix::unistd::{close, dup};

use super::call_deadline::CallDeadline;
use crate::process::PerProcess;
use crate::sync::{Mutex, MutexGuard};
use crate::url::{Peer, Target};

/// The sockets that are known to belong to connections of this process.
static KNOWN: PerProcess<Mutex<BTreeSet<Socket>>> = PerProcess::new();

fn known() -> MutexGuard<'static, BTreeSet<Socket>> {
    KNOWN.get_or_init(Mutex::default).lock()
}

static LOCAL_CONNECT: PerProcess<Mutex<()>> = PerProcess::new();

/// The time that a connect to a local socket waits for the lock. Without the lock, the search may find nothing.
const LOCAL_CONNECT_WAIT: Duration = Duration::from_millis(100);

/// The number of connects to a local server until the socket of one is known. Other parts of the program may open
/// sockets to the same server at the same time.
const CONNECTS_TO_FIND_SOCKET: u32 = 3;

/// An open socket of this process. The inode number distinguishes it from a later socket with the same descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Socket {
    descriptor: i32,
    inode: u64,
}

/// The wait for the server to close its end of a connection that this process closes.
#[derive(Debug)]
pub(super) struct ServerClose(Socket);

// Only `server_close` duplicates the descriptor. Elsewhere a SQLite file may have got the descriptor in the
// meantime, and closing the duplicate would release the locks of this process on that file.
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
    pub(super) fn server_close(self) -> Option<ServerClose> {
        let mut known = known();
        if !self.is_open() {
            return None;
        }
        // The calling thread owns the open connection, so the descriptor cannot belong to a SQLite file.
        let twin = Self { descriptor: dup(self.descriptor).ok()?, ..self };
        known.insert(twin);
        Some(ServerClose(twin))
    }

    /// Has to be called before the connection is closed.
    pub(super) fn forget(self) {
        known().remove(&self);
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
    pub(super) fn wait(&self, end: Instant) {
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

/// Connects, and finds the socket of the connection if possible. `own_port` asks the server for the client's port on the
/// new connection. The inner `None` is the answer for a local socket.
pub(super) fn connect_and_find<C, E>(
    target: &Target,
    connect: impl Fn() -> Result<C, E>,
    own_port: impl Fn(&mut C) -> Option<Option<u16>>,
) -> Result<(C, Option<Socket>), E> {
    // Of several connects to a local socket, each is alone, so only one socket is new after it.
    let local_connect = LOCAL_CONNECT.get_or_init(Mutex::default);
    let _alone = if target.is_local() { local_connect.try_lock_for(LOCAL_CONNECT_WAIT) } else { None };
    let peer = target.peer();
    let mut attempts_left = CONNECTS_TO_FIND_SOCKET;
    loop {
        attempts_left -= 1;
        // A duplicated descriptor has the inode number of its socket.
        let before: BTreeSet<u64> = sockets().into_iter().map(|socket| socket.inode).collect();
        let mut conn = connect()?;
        let mut new = sockets();
        new.retain(|socket| !before.contains(&socket.inode) && socket.leads_to(&peer));
        new.retain(|socket| known().iter().all(|other| other.inode != socket.inode));
        if new.len() > 1
            && let Some(port) = own_port(&mut conn)
        {
            new.retain(|socket| socket.own_port() == port);
        }
        match new[..] {
            [socket] => {
                known().insert(socket);
                return Ok((conn, Some(socket)));
            }
            [_, ..] if attempts_left > 0 && target.is_local() => {}
            _ => return Ok((conn, None)),
        }
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

    impl Socket {
        /// A socket that does not exist.
        pub(in super::super) fn none() -> Self {
            Self { descriptor: -1, inode: 0 }
        }
    }

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
        let deadline = started + Duration::from_secs(5);
        server_close.wait(deadline);
        let ended = Instant::now();
        assert!(ended - started >= Duration::from_millis(100), "{:?}", ended - started);
        assert!(ended < deadline, "the wait ends with the close, not at its deadline");
        closer.join().expect("no panic");
    }

    #[test]
    fn search_finds_the_socket_of_a_connect_beside_others() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let other = TcpListener::bind("127.0.0.1:0").expect("a port");
        let target = Target::parse(&format!("postgres://app@127.0.0.1:{port}/shop"), None).expect("valid");
        let earlier = TcpStream::connect(("127.0.0.1", port)).expect("listens");
        let connect = || {
            let elsewhere = TcpStream::connect(other.local_addr().expect("bound"))?;
            Ok::<_, std::io::Error>((TcpStream::connect(("127.0.0.1", port))?, elsewhere))
        };
        let ((mine, elsewhere), found) = connect_and_find(&target, connect, |_| None).expect("they listen");
        let found = found.expect("found");
        assert_eq!(found, socket_of(&mine));
        found.forget();
        drop((earlier, elsewhere));
    }

    #[test]
    fn search_asks_the_server_if_two_sockets_qualify_and_does_not_guess() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let target = Target::parse(&format!("mysql://app@127.0.0.1:{port}/shop"), None).expect("valid");
        let both = |own: fn(&TcpStream) -> Option<Option<u16>>| {
            let connect = || {
                let both = [0; 2].map(|_| TcpStream::connect(("127.0.0.1", port)).expect("listens"));
                Ok::<_, std::io::Error>(both)
            };
            let (conns, found) = connect_and_find(&target, connect, |conns| own(&conns[0])).expect("they listen");
            found.iter().for_each(|socket| socket.forget());
            assert!(found.is_none_or(|socket| socket == socket_of(&conns[0])));
            found.is_some()
        };
        assert!(both(|mine| Some(Some(mine.local_addr().expect("connected").port()))));
        assert!(!both(|_| None));
        assert!(!both(|_| Some(Some(1))));
    }

    #[test]
    fn search_finds_a_local_socket_by_its_path_beside_a_network_socket() {
        let network = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = network.local_addr().expect("bound");
        let folder = std::env::temp_dir().join(format!("diesel-session-socket-{}", std::process::id()));
        let path = folder.join(format!(".s.PGSQL.{}", address.port()));
        fs::create_dir_all(&folder).expect("a folder");
        let listener = UnixListener::bind(&path).expect("a socket");
        let other = UnixListener::bind(folder.join("other")).expect("a socket");
        let url = format!("postgres:///shop?host={}&port={}", folder.display(), address.port());
        let target = Target::parse(&url, None).expect("valid");
        assert!(target.is_local());
        let connect = || {
            let others = (UnixStream::connect(folder.join("other"))?, TcpStream::connect(address)?);
            Ok::<_, std::io::Error>((UnixStream::connect(&path)?, others))
        };
        let ((mine, others), found) = connect_and_find(&target, connect, |_| Some(None)).expect("they listen");
        fs::remove_dir_all(&folder).expect("its own");
        assert_eq!(found, Some(socket_of(&mine)));
        found.iter().for_each(|socket| socket.forget());
        drop((listener, other, others));
    }
}
