//! What is done once, before a template is taken, so that no container has to wait for it.
use crate::{error::Result, server::Server};
use caisson_agent_protocol::Reply;

impl Server {
    pub(crate) fn prepare(&mut self) -> Result<Reply> {
        Ok(Reply::Done)
    }
}
