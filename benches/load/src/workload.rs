//! What is asked of the proxies: a table. A row more is a workload more.

use crate::Failure;

/// One kind of request, asked by many clients again and again.
#[derive(Debug)]
pub(crate) struct Workload {
    /// On the command line.
    pub(crate) name: &'static str,
    /// In the results.
    pub(crate) title: &'static str,
    /// Bytes of the request's body; 0 makes it a GET.
    pub(crate) upload: usize,
    /// Bytes of the answer's body.
    pub(crate) download: usize,
    /// Fields that this workload's requests carry beside the usual ones, each with its line's end.
    pub(crate) fields: &'static str,
    /// Keep-alive connections.
    pub(crate) clients: usize,
    /// Requests per second when latency is measured: far below what any of the proxies reaches.
    /// Without one it is not measured.
    pub(crate) rate: Option<u32>,
}

const SMALL: usize = 128;
const KIB: usize = 1024;

const USUAL: Workload = Workload {
    name: "",
    title: "",
    upload: 0,
    download: SMALL,
    fields: "",
    clients: 64,
    rate: None,
};

/// In the order of the results.
pub(crate) const WORKLOADS: &[Workload] = &[
    Workload { name: "get", title: "GET, 128 bytes", rate: Some(10_000), ..USUAL },
    Workload { name: "post-1k", title: "POST 1 KiB", upload: KIB, rate: Some(10_000), ..USUAL },
    Workload { name: "get-64k", title: "GET 64 KiB", download: 64 * KIB, ..USUAL },
    Workload { name: "post-64k", title: "POST 64 KiB", upload: 64 * KIB, ..USUAL },
];

impl Workload {
    /// The row of that name.
    pub(crate) fn named(name: &str) -> Result<&'static Self, Failure> {
        let row = WORKLOADS.iter().find(|workload| workload.name == name);
        row.ok_or_else(|| format!("there is no workload `{name}`").into())
    }

    /// The bytes of one request.
    pub(crate) fn request(&self) -> Vec<u8> {
        self.request_with("")
    }

    /// The same with more fields, each with its line's end.
    pub(crate) fn request_with(&self, more: &str) -> Vec<u8> {
        let (method, body) = match self.upload {
            0 => ("GET", String::new()),
            size => ("POST", format!("Content-Type: text/plain\r\nContent-Length: {size}\r\n")),
        };
        let mut request = format!(
            "{method} /{} HTTP/1.1\r\nHost: abaci.one\r\nUser-Agent: litegate-load\r\n\
             Accept: */*\r\nAccept-Encoding: gzip\r\n{body}{}{more}\r\n",
            self.download, self.fields
        )
        .into_bytes();
        request.resize(request.len() + self.upload, b'x');
        request
    }
}

/// Every size of an answer that the upstream has to know.
pub(crate) fn sizes() -> Vec<usize> {
    WORKLOADS.iter().map(|workload| workload.download).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Reader;

    #[test]
    fn each_request_is_one_whole_message() {
        for workload in WORKLOADS {
            let mut reader = Reader::default();
            let mut uploads = Vec::new();
            let head = |_: &[u8], upload| {
                uploads.push(upload);
                Ok(())
            };
            assert_eq!(reader.feed(&workload.request(), head), Ok(1), "{}", workload.name);
            assert_eq!(uploads, [workload.upload], "{}", workload.name);
        }
    }
}
